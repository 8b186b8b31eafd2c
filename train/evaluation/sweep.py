"""The same training with other settings: every combination of the values asked for, trained and scored alike."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from datapipe.shards.store import Store
from train.evaluation.report import REPORT, Evaluation, Mean
from train.evaluation.trials import STOPPED, Trial, check_trials, run_trials
from train.trainer.recipe import TrainRecipe

LONGEST_NAME = 120
_QUESTION = "evaluation"


@dataclass(frozen=True)
class Combination:
    """One value of each setting. scores: by metric, or `why` there are none, in one line."""

    settings: tuple[str, ...]
    scores: dict[str, Mean]
    why: str = ""


def sweep(
    recipes: Mapping[tuple[str, ...], TrainRecipe],
    out: Path,
    asked: Evaluation,
    ray_address: str | None = None,
) -> list[Combination]:
    """Trains and scores every combination, each in a folder of its own, named for its settings. One that fails is told
    with its reason. Asked to stop, as `run_trials` is, it returns what is scored; run again, it goes on.

    recipes: by the settings in which they differ from each other, as overrides of a recipe. Raises SddError.
    """
    questions = {_QUESTION: asked.model_copy(update={"ways": ("subject",)})}
    trials = {
        settings: Trial(", ".join(settings), out / _folder(settings), recipe, questions)
        for settings, recipe in recipes.items()
    }
    check_trials(list(trials.values()))
    failed = run_trials(list(trials.values()), out, ray_address)
    return [_combination(settings, trial, failed.get(trial.name, "")) for settings, trial in trials.items()]


def _folder(settings: Sequence[str]) -> str:
    """The settings themselves where they can name a folder, else their beginning and a hash."""
    wanted = ",".join(settings)
    name = re.sub(r"[^\w.,=+-]", "_", wanted)[:LONGEST_NAME]
    return name if name == wanted else f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"


def _combination(settings: tuple[str, ...], trial: Trial, why: str) -> Combination:
    reports = None if why else trial.reports()
    return Combination(settings, reports[_QUESTION].groups["all"].means["subject"] if reports else {}, why)


def write_sweep(found: Sequence[Combination], asked: Evaluation, out: Path) -> None:
    """`report.json` in the folder of all runs."""
    tree: Mapping[str, Any] = {
        "asked": asked.model_dump(mode="json", exclude={"ways"}),
        "combinations": [dataclasses.asdict(combination) for combination in found],
    }
    Store(str(out)).put(REPORT, json.dumps(tree, indent=1).encode())


def table(found: Sequence[Combination]) -> Table:
    """For the terminal: a line for each combination, in the order asked for."""
    keys = [setting.partition("=")[0].split(".")[-1] for setting in found[0].settings]
    metrics = list(next((c.scores for c in found if c.scores), ["clip"]))
    shown = Table(*keys, *metrics, box=None)
    for c in found:
        values = [setting.partition("=")[2] for setting in c.settings]
        means = [str(c.scores[metric]) for metric in metrics] if c.scores else [c.why if c.why == STOPPED else "failed"]
        shown.add_row(*values, *means)
    return shown
