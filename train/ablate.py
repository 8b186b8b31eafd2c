"""The paper's ablation in miniature: the model without each of its parts, trained alike, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from datapipe.errors import RunError
from datapipe.recipe import Recipe
from train.evaluate import Mean, evaluate_run, mean_of
from train.launch import train
from train.loop import PIPELINE
from train.recipe import TrainRecipe

FULL = "full"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "no location mask": {"location_mask": False},
    "no box coordinates": {"box_embedding": False},
    "no adapter": {"adapter": False},
    "no attention loss": {"attention_loss": "none"},
    "no image CLS": {"image_cls": False},
}
PAPER: dict[str, dict[int, tuple[float, float]]] = {
    FULL: {1: (0.787, 0.293), 2: (0.696, 0.310)},
    "no location mask": {1: (0.778, 0.275), 2: (0.666, 0.281)},
    "no box coordinates": {1: (0.810, 0.282), 2: (0.687, 0.305)},
    "no adapter": {1: (0.731, 0.291), 2: (0.649, 0.307)},
    "no attention loss": {1: (0.789, 0.288), 2: (0.688, 0.302)},
    "no image CLS": {1: (0.719, 0.299), 2: (0.627, 0.309)},
}
"""CLIP-I and CLIP-T of DreamBench with one subject and with two (paper, ablation table)."""
METRICS = ("clip", "text")
"""Ours in the place of CLIP-I and CLIP-T."""


@dataclass(frozen=True)
class Cell:
    """A variant with so many subjects, by metric: its mean, and its difference from the full model, image by image."""

    variant: str
    subjects: int
    metric: str
    value: Mean
    change: Mean

    @property
    def papers_change(self) -> float:
        place = METRICS.index(self.metric)
        return PAPER[self.variant][self.subjects][place] - PAPER[FULL][self.subjects][place]

    @property
    def verdict(self) -> str:
        """Whether the sign is the paper's; unclear where the interval holds 0."""
        if self.change.low <= 0 <= self.change.high:
            return "unclear"
        return "as the paper" if (self.change.mean > 0) == (self.papers_change > 0) else "opposite"


def ablate(
    recipe: TrainRecipe, out: Path, data: str, images: int, labels: Recipe, seeds: Sequence[int]
) -> Iterator[tuple[str, int]]:
    """Trains and scores every variant with every seed, each in a folder of its own; yields (variant, seed) as they are
    done. Stopped and run again, it goes on. Raises RunError when asked to stop."""
    for seed in seeds:
        for variant, changes in VARIANTS.items():
            run = folder(out, variant, seed)
            model = recipe.model.model_copy(update=changes)
            if not (run / PIPELINE).exists() and not train(
                recipe.model_copy(update={"model": model, "seed": seed}), run
            ):
                raise RunError(f"stopped while training {run}; the same command goes on from here")
            for subjects in (1, 2):
                report = run / f"evaluation-{subjects}"
                if not (report / "report.json").exists():
                    evaluate_run(run, data, images, subjects, labels, report)
            yield variant, seed


def folder(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant.replace(' ', '-')}-{seed}"


def compare(out: Path, seeds: Sequence[int]) -> list[Cell]:
    """From the reports of `ablate`. Intervals are over images and seeds together."""
    cells = []
    for subjects in (1, 2):
        values = {v: [_values(folder(out, v, seed), subjects) for seed in seeds] for v in VARIANTS}
        for metric in METRICS:
            of = {v: np.concatenate([by_metric[metric] for by_metric in runs]) for v, runs in values.items()}
            cells += [Cell(v, subjects, metric, mean_of(of[v]), mean_of(of[v] - of[FULL])) for v in VARIANTS]
    return cells


def _values(run: Path, subjects: int) -> dict[str, np.ndarray[Any, Any]]:
    report = json.loads((run / f"evaluation-{subjects}" / "report.json").read_text())
    return {metric: np.array(values) for metric, values in report["all"]["per_image"]["subject"].items()}


def table(cells: Sequence[Cell]) -> Table:
    headings = ("subjects", "metric", "variant", "mean", "change", "paper's change", "sign")
    shown = Table(*headings, box=None)
    for c in cells:
        full = c.variant == FULL
        rest = ("", "", "") if full else (str(c.change), f"{c.papers_change:+.3f}", c.verdict)
        shown.add_row(str(c.subjects), c.metric, c.variant, str(c.value), *rest)
    return shown
