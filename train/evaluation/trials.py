"""Runs that are compared with each other: trained and scored on Ray Tune, as many at the same time as fit."""

from __future__ import annotations

import operator
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from datapipe.cluster import connected, nodes
from datapipe.shards.store import Store
from subject_diffusion.errors import RunError, one_line
from train.evaluation.cases import load_cases
from train.evaluation.evaluate import evaluate_run
from train.evaluation.report import Evaluation, Report, read_report
from train.trainer.launch import device_of_cluster, sigterm_calls, train_inside
from train.trainer.pipeline import read_recipe
from train.trainer.recipe import TrainRecipe
from train.trainer.resume import changed_settings, check_same_run
from train.trainer.run_folder import RECIPE, STOP

STOPPED = "stopped"
"""Why a trial came to no end that was asked to."""
ALIKE = (
    "image_encoder",  # measures, too
    "examples.size_px",
    "examples.min_visible",
    "run.workers",
    "run.threads",
    "run.device",
)
"""Settings in which runs that are compared may not differ."""
_TUNES_FOLDER = "ray"
_OUTSIDE = PlacementGroupSchedulingStrategy(placement_group=None)
"""Not in the room that Ray Tune keeps for a trial's own process."""
_TELL_EVERY_S = 2.0
_TUNES_OWN_WAYS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run keeps a log of its own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends this command as it ends the others
    "RAY_AIR_NEW_OUTPUT": "0",  # the other kind is not silent at verbose=0
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # runs go on from their own checkpoints
}


@dataclass(frozen=True)
class Trial:
    """A run, and what it is asked once it is trained."""

    name: str
    run: Path
    recipe: TrainRecipe
    asked: Mapping[str, Evaluation]
    """By the name of the folder in the run's own that the report goes to."""

    def reports(self) -> dict[str, Report] | None:
        """None unless all are there."""
        found = {}
        for name, asked in self.asked.items():
            if (report := read_report(self.run / name, asked, self.recipe.validation)) is None:
                return None
            found[name] = report
        return found


def check_trials(trials: Sequence[Trial]) -> None:
    """Raises RunError where runs ask for different room or would not be measured alike, a dataset has too few images
    for what is asked, or a run has learned otherwise: it may go on so by itself, but then it cannot be compared with
    the others."""
    for key in ALIKE:
        if len({operator.attrgetter(key)(trial.recipe) for trial in trials}) > 1:
            raise RunError(f"{key} has to be the same in all runs that are compared")
    examples = trials[0].recipe.examples
    for data, images, subjects in {(a.data, a.images, a.subjects) for t in trials for a in t.asked.values()}:
        load_cases(data, images, examples, (subjects, subjects))
    for trial in trials:
        if (trial.run / RECIPE).exists():
            before = read_recipe(trial.run)
            check_same_run(str(trial.run), before, trial.recipe)
            for key, (was, now) in changed_settings(before, trial.recipe).items():
                raise RunError(f"{trial.run} holds a run with another {key}: {was!r}, now {now!r}; name another --out")


def run_trials(trials: Sequence[Trial], out: Path, ray_address: str | None = None) -> dict[str, str]:
    """Trains and scores each run, unless that is done; run again, it goes on. Ends early when asked to stop, by SIGTERM
    or a file `stop` in `out`: what was learned is saved.

    Returns by the name of a trial why it came to no end, in one line. Raises SddError.
    """
    left = {trial.name: trial for trial in trials if trial.reports() is None}
    if not left:
        return {}
    out = out.absolute()
    store = Store(str(out))
    with store.lock():
        store.remove([STOP])
        return _run_on_tune(left, out, ray_address)


def _run_on_tune(trials: Mapping[str, Trial], out: Path, ray_address: str | None) -> dict[str, str]:
    recipe = next(iter(trials.values())).recipe
    os.environ.update(_TUNES_OWN_WAYS)
    with (
        connected(ray_address),
        _Display(trials.values()) as display,
        sigterm_calls(lambda: Store(str(out)).put(STOP, b"")),
    ):
        what = tune.with_parameters(
            _train_and_score, trials=trials, out=out, folder=Path.cwd(), ray_address=ray_address
        )
        tuner = tune.Tuner(
            tune.with_resources(what, _resources(recipe, ray_address)),
            param_space={"trial": tune.grid_search(list(trials))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=_at_once(recipe, ray_address),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=_TUNES_FOLDER,
                storage_path=str(out),
                failure_config=tune.FailureConfig(max_failures=recipe.run.max_failures),  # deaths of its process
                verbose=0,
                callbacks=[display],
            ),
        )
        tuner.fit()
        shutil.rmtree(out / _TUNES_FOLDER)
    return display.failed


def _resources(recipe: TrainRecipe, ray_address: str | None) -> dict[str, float]:
    """Of a trial's own process. Where a run has several, they have their own."""
    if recipe.run.workers > 1:
        return {"cpu": 0.01}  # Ray Tune refuses none
    if device_of_cluster(recipe, ray_address).type == "cuda":
        return {"cpu": 1.0, "gpu": 1.0}
    return {"cpu": _threads(recipe)}


def _at_once(recipe: TrainRecipe, ray_address: str | None) -> int:
    """How many runs fit the cluster."""
    cpus, gpus = (sum(each) for each in zip(*nodes(), strict=True))
    if device_of_cluster(recipe, ray_address).type == "cuda":
        return max(1, int(gpus / recipe.run.workers))
    return max(1, int(cpus / (recipe.run.workers * _threads(recipe))))


def _threads(recipe: TrainRecipe) -> float:
    """Of each process, at most as many as a node has cores: what asks for more would wait for ever."""
    cores = max(cpus for cpus, _ in nodes())
    return min(recipe.run.threads or cores, cores)


def _train_and_score(
    config: Mapping[str, str], trials: Mapping[str, Trial], out: Path, folder: Path, ray_address: str | None
) -> None:
    """What the process of a trial does. It reports steps, and at last why the trial came to no end, if it did not."""
    trial = trials[config["trial"]]
    try:
        _enter(folder)
        why = _learned_and_scored(trial, out, folder, ray_address)
    except Exception as error:  # would happen again: what runs again is what died
        why = one_line(getattr(error, "cause", error))
    tune.report({"step": trial.recipe.optimizer.steps, "why": why})


def _learned_and_scored(trial: Trial, out: Path, folder: Path, ray_address: str | None) -> str:
    if not out.is_dir():
        return f"--out {out}: this node does not see the folder; name one that all nodes share"
    if (out / STOP).exists() or not train_inside(trial.recipe, trial.run, ray_address, _Steps(trial, out)):
        return STOPPED
    if _has_no_gpu_of_its_own(trial.recipe):
        room: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1, "scheduling_strategy": _OUTSIDE}
        ray.get(ray.remote(_score).options(**room).remote(trial, folder))
    else:
        _score(trial, folder)
    return ""


def _enter(folder: Path) -> None:
    """Ray's workers have a folder of their own, where relative paths lead nowhere."""
    if folder.is_dir():
        os.chdir(folder)


def _has_no_gpu_of_its_own(recipe: TrainRecipe) -> bool:
    """Whether this process has none, and those that trained had."""
    return recipe.run.workers > 1 and recipe.run.device != "cpu" and any(gpus for _, gpus in nodes())


def _score(trial: Trial, folder: Path) -> None:
    _enter(folder)
    for name, asked in trial.asked.items():
        if read_report(trial.run / name, asked, trial.recipe.validation) is None:
            evaluate_run(trial.run, asked, trial.run / name)


class _Steps:
    """A run's progress, as results of Ray Tune's. Passes on that all runs are asked to stop."""

    def __init__(self, trial: Trial, out: Path) -> None:
        self._trial, self._out = trial, out
        self._next_s = 0.0

    def advance_to(self, step: int) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _TELL_EVERY_S
            if (self._out / STOP).exists():
                Store(str(self._trial.run)).put(STOP, b"")
            tune.report({"step": step, "why": None})

    def line(self, text: str) -> None:
        """TensorBoard's log in the run's folder has it."""


class _Display(tune.Callback):  # type: ignore[misc]  # Ray Tune has no types
    """A bar over the steps of all trials, and a line for each that has come to its end."""

    def __init__(self, trials: Collection[Trial]) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._steps = dict.fromkeys((trial.name for trial in trials), 0)
        self._task = self._progress.add_task("", total=sum(trial.recipe.optimizer.steps for trial in trials))
        self._ended = 0
        self.failed: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune writes its settings down, to go on from; runs go on from their own checkpoints."""
        return {}

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        name = trial.config["trial"]
        self._steps[name] = result["step"]
        if result["why"] is not None:
            self._end(name, result["why"])
        self._progress.update(
            self._task,
            completed=sum(self._steps.values()),
            description=f"{self._ended} of {len(self._steps)} runs trained and scored",
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial.config["trial"], f"its process died {trial.num_failures} times")

    def _end(self, name: str, why: str) -> None:
        self._ended += 1
        if why:
            self.failed[name] = why
        if why != STOPPED:
            self._progress.console.print(f"{name}: {why or 'scored'}", highlight=False, soft_wrap=True)
