"""The paper's ablation in miniature: the model without each of its parts, trained alike, and what that costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from datapipe.shards.store import Store
from subject_diffusion.errors import RunError
from train.evaluation.metrics import METRICS
from train.evaluation.report import REPORT, RESAMPLES, TEXT, Evaluation, Mean
from train.evaluation.trials import STOPPED, Trial, check_trials, run_trials
from train.trainer.recipe import TrainRecipe

FULL = "full"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "no location mask": {"location_mask": False},
    "no box coordinates": {"box_embedding": False, "adapter_reach": "image"},
    "no adapter": {"adapter": False},
    "no attention loss": {"attention_loss": "none"},
    "no image CLS": {"image_cls": False},
}
PAPER: dict[str, dict[int, tuple[float, float, float]]] = {
    FULL: {1: (0.711, 0.787, 0.293), 2: (0.506, 0.696, 0.310)},
    "no location mask": {1: (0.694, 0.778, 0.275), 2: (0.477, 0.666, 0.281)},
    "no box coordinates": {1: (0.732, 0.810, 0.282), 2: (0.464, 0.687, 0.305)},
    "no adapter": {1: (0.534, 0.731, 0.291), 2: (0.411, 0.649, 0.307)},
    "no attention loss": {1: (0.692, 0.789, 0.288), 2: (0.500, 0.688, 0.302)},
    "no image CLS": {1: (0.637, 0.719, 0.299), 2: (0.457, 0.627, 0.309)},
}
"""DINO, CLIP-I and CLIP-T of DreamBench with one subject and with two (paper, ablation table)."""
PAPERS_COLUMN = {"clip": 1, "pattern": 0, "color": None, TEXT: 2}
"""The metrics that are compared, and the column of `PAPER` that each stands for: pattern for DINO, because both tell
individuals of a kind apart."""
SUBJECTS = (1, 2)


@dataclass(frozen=True)
class VariantScore:
    """A variant trained with a seed. per_image: by metric, in the order of the images."""

    variant: str
    seed: int
    subjects: int
    per_image: dict[str, list[float]]


@dataclass(frozen=True)
class Cell:
    """A variant with so many subjects, by metric: its mean, and image by image how much better it is than the full
    model."""

    variant: str
    subjects: int
    metric: str
    value: Mean
    gain: Mean

    @property
    def papers_gain(self) -> float | None:
        place = PAPERS_COLUMN[self.metric]
        if place is None:
            return None
        return PAPER[self.variant][self.subjects][place] - PAPER[FULL][self.subjects][place]

    @property
    def verdict(self) -> str:
        """Whether the sign is the paper's; unclear where the interval holds 0."""
        if self.papers_gain is None:
            return ""
        if self.gain.low <= 0 <= self.gain.high:
            return "unclear"
        return "as the paper" if (self.gain.mean > 0) == (self.papers_gain > 0) else "opposite"


def ablate(
    recipe: TrainRecipe, out: Path, asked: Evaluation, seeds: Sequence[int], ray_address: str | None = None
) -> list[VariantScore]:
    """Trains and scores every variant with every seed, each in a folder of its own, with one subject and with two.
    Returns what was scored: less than all when asked to stop, as `run_trials` is; run again, it goes on.

    asked: the question put to every run; the number of subjects is set here. Raises SddError.
    """
    questions = {f"evaluation-{n}": asked.model_copy(update={"subjects": n, "ways": ("subject",)}) for n in SUBJECTS}
    runs = [
        (variant, seed, Trial(f"{variant}, seed {seed}", folder, _varied(recipe, changes, seed), questions))
        for seed in seeds
        for variant, changes in VARIANTS.items()
        for folder in [out / f"{variant.replace(' ', '-')}-{seed}"]
    ]
    trials = [trial for _, _, trial in runs]
    check_trials(trials)
    for name, why in run_trials(trials, out, ray_address).items():
        if why != STOPPED:
            raise RunError(f"{name}: {why}")
    return [
        VariantScore(variant, seed, subjects, reports[question].groups["all"].per_image["subject"])
        for variant, seed, trial in runs
        if (reports := trial.reports()) is not None
        for subjects, question in zip(SUBJECTS, questions, strict=True)
    ]


def _varied(recipe: TrainRecipe, changes: Mapping[str, Any], seed: int) -> TrainRecipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes), "seed": seed})


def compare(scores: Sequence[VariantScore]) -> list[Cell]:
    """In the order of subjects, metrics and variants."""
    return [
        _cell(scores, variant, subjects, metric)
        for subjects in SUBJECTS
        for metric in PAPERS_COLUMN
        for variant in VARIANTS
    ]


def _cell(scores: Sequence[VariantScore], variant: str, subjects: int, metric: str) -> Cell:
    own, full = (
        np.array([s.per_image[metric] for s in scores if (s.variant, s.subjects) == (name, subjects)])
        for name in (variant, FULL)
    )
    better = METRICS[metric].better if metric in METRICS else 1
    value, gain = mean_over_seeds_and_images(own), mean_over_seeds_and_images(better * (own - full))
    return Cell(variant, subjects, metric, value, gain)


def mean_over_seeds_and_images(values: NDArray[np.float64]) -> Mean:
    """values: (seeds, images). The interval is that of a bootstrap over both, because another seed trains another model
    and the images of all seeds are the same."""
    rng = np.random.default_rng(0)
    seeds, images = (rng.integers(n, size=(RESAMPLES, n)) for n in values.shape)
    means = [values[np.ix_(*drawn)].mean() for drawn in zip(seeds, images, strict=True)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """What was trained and asked, and every cell."""

    recipe: TrainRecipe
    asked: Evaluation
    seeds: Sequence[int]
    cells: Sequence[Cell]

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "asked": self.asked.model_dump(mode="json", exclude={"subjects", "ways"}),
            "seeds": list(self.seeds),
            "cells": [dataclasses.asdict(c) | {"papers_gain": c.papers_gain, "verdict": c.verdict} for c in self.cells],
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Comparison:
        cells = [
            Cell(c["variant"], c["subjects"], c["metric"], Mean(**c["value"]), Mean(**c["gain"])) for c in tree["cells"]
        ]
        recipe, asked = TrainRecipe.model_validate(tree["recipe"]), Evaluation.model_validate(tree["asked"])
        return cls(recipe, asked, tree["seeds"], cells)

    def write(self, out: Path) -> None:
        """`report.json` in the folder of all runs."""
        Store(str(out)).put(REPORT, json.dumps(self.to_json(), indent=1).encode())


def table(cells: Sequence[Cell]) -> Table:
    """For the terminal."""
    shown = Table("subjects", "metric", "variant", "mean", "gain over full", "paper's gain", "sign", box=None)
    for c in cells:
        papers = "" if c.papers_gain is None else f"{c.papers_gain:+.3f}"
        rest = ("", "", "") if c.variant == FULL else (str(c.gain), papers, c.verdict)
        shown.add_row(str(c.subjects), c.metric, c.variant, str(c.value), *rest)
    return shown
