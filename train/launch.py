"""A recipe becomes a run: in this process, or in several, one a GPU, placed by Ray Train."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from pydantic import ValidationError
from ray.util.queue import Queue

from datapipe.cluster import connected
from datapipe.errors import RunError, SddError
from datapipe.shards.store import Store
from model.base import first_line
from train.checkpoint import checkpoints
from train.loop import CHECKPOINTS, PIPELINE, STOP, Trainer
from train.recipe import TrainRecipe
from train.watch import Screen, terminal

RECIPE = "recipe.json"
"""Of the run that a folder holds, whole."""


def train(recipe: TrainRecipe, out: Path, ray_address: str | None = None) -> bool:
    """Trains, from the newest checkpoint in `out` if there is one. Returns False when asked to stop before the end, by
    SIGTERM or by a file `stop` in `out`: what was learnt is saved. Raises SddError."""
    device = _device(recipe)
    stop = out.absolute() / STOP
    with _claimed(out, recipe), terminal(recipe.optimizer.steps) as screen:
        if recipe.run.workers == 1:
            with _stopped_by_sigterm(stop):
                return Trainer(recipe, out, device).run(screen)
        with connected(ray_address), _stopped_by_sigterm(stop), _relayed(screen) as relay:  # Ray has a handler, too
            return _train_together(recipe, out.absolute(), device, relay)


class _Relay:
    """The screen of the process that started the run, for those that train, on other machines perhaps."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._next_s = 0.0

    def at(self, step: int) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + 0.5
            self._queue.put(step)

    def say(self, line: str) -> None:
        self._queue.put(line)


@contextlib.contextmanager
def _relayed(screen: Screen) -> Iterator[_Relay]:
    queue = Queue(actor_options={"num_cpus": 0})

    def show() -> None:
        while (news := queue.get()) is not None:
            screen.say(news) if isinstance(news, str) else screen.at(news)

    shower = threading.Thread(target=show, daemon=True)
    shower.start()
    try:
        yield _Relay(queue)
    finally:
        queue.put(None)
        shower.join()
        queue.shutdown()


def _train_together(recipe: TrainRecipe, out: Path, device: torch.device, relay: _Relay) -> bool:
    gpu = device.type == "cuda"
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"recipe": recipe, "out": str(out), "folder": os.getcwd(), "screen": relay},
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.run.workers,
            use_gpu=gpu,
            resources_per_worker=None if gpu else {"CPU": 0.5},
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=ray.train.RunConfig(name="run", storage_path=str(out / "ray")),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause: Any = getattr(failure, "cause", failure)
            if isinstance(cause, SddError):
                raise cause from None
        raise
    return not (out / STOP).exists()


def _worker(config: dict[str, Any]) -> None:
    recipe: TrainRecipe = config["recipe"]
    if os.path.isdir(config["folder"]):  # Ray's workers have a folder of their own, where relative paths lead nowhere
        os.chdir(config["folder"])
    Trainer(recipe, Path(config["out"]), ray.train.torch.get_device()).run(config["screen"])


@contextlib.contextmanager
def _claimed(out: Path, recipe: TrainRecipe) -> Iterator[None]:
    """A folder that no other run writes to, and that has learnt nothing yet, or with this recipe. Raises RunError."""
    if not recipe.sources:
        raise RunError("no data to learn from: name a dataset with --data, or sources in the recipe")
    if re.match(r"\w+:/", str(out)):
        raise RunError(f"--out {out}: a run is written to a local folder; copy its pipeline from there")
    folder = Store(str(out))
    with folder.lock():
        folder.clear_temporaries()
        if folder.exists(RECIPE) and (checkpoints(out / CHECKPOINTS) or (out / PIPELINE).exists()):
            before, now = read_recipe(out).identity(), recipe.identity()
            other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            if other:
                raise RunError(
                    f"{out} holds a run with another {other[0]}: {before.get(other[0])!r}, now {now.get(other[0])!r}; "
                    "name another --out, or remove it"
                )
        folder.put(RECIPE, recipe.model_dump_json(indent=1).encode())
        (out / STOP).unlink(missing_ok=True)
        yield


def read_recipe(out: Path) -> TrainRecipe:
    """Of the run in a folder. Raises RunError."""
    try:
        return TrainRecipe.model_validate_json((out / RECIPE).read_text())
    except (OSError, ValidationError) as error:
        raise RunError(f"{out}: no training run of `sdd train` ({first_line(error)})") from None


def _device(recipe: TrainRecipe) -> torch.device:
    wanted = recipe.run.device
    if wanted == "cuda" and not torch.cuda.is_available() and recipe.run.workers == 1:
        raise RunError("run.device: cuda, and this machine has no GPU that PyTorch can use; set run.device=auto")
    has = torch.cuda.is_available() or wanted == "cuda"
    return torch.device("cuda" if has and wanted != "cpu" else "cpu")


@contextlib.contextmanager
def _stopped_by_sigterm(stop: Path) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: stop.touch())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
