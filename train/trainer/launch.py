"""A recipe becomes a run: in this process, or in several, one per GPU, placed by Ray Train."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue

from datapipe.cluster import connected
from datapipe.shards.store import Store
from subject_diffusion.errors import RunError, SddError
from train.trainer.checkpoint import checkpoints
from train.trainer.logging import ProgressDisplay, terminal_progress
from train.trainer.loop import Trainer
from train.trainer.pipeline import read_recipe
from train.trainer.recipe import TrainRecipe
from train.trainer.resume import check_same_run
from train.trainer.run_folder import CHECKPOINTS, PIPELINE, RECIPE, STOP, check_start, trained_model


def train(recipe: TrainRecipe, out: Path, ray_address: str | None = None) -> bool:
    """Trains, from the newest checkpoint in `out` if there is one. Returns False when asked to stop before the end, by
    a file `stop` in `out`: what was learned is saved. So it is on SIGTERM, which then ends the process as it would have
    without this. Raises SddError."""
    device = _device(recipe)
    stop = out.absolute() / STOP
    with _claimed(out, recipe), terminal_progress(recipe.optimizer.steps) as display:
        if recipe.run.workers == 1:
            trainer = Trainer(recipe, out, device)
            with _sigterm_saves(stop):
                return trainer.run(display)
        with connected(ray_address), _remote(display) as remote, _sigterm_saves(stop):
            return _train_together(recipe, out.absolute(), device, remote)


class _RemoteDisplay:
    """The progress display of the process that started the run, for those that train, perhaps on other machines."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._next_s = 0.0

    def advance_to(self, step: int) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + 0.5
            self._queue.put(step)

    def line(self, text: str) -> None:
        self._queue.put(text)


@contextlib.contextmanager
def _remote(display: ProgressDisplay) -> Iterator[_RemoteDisplay]:
    queue = Queue(actor_options={"num_cpus": 0})

    def show() -> None:
        while (news := queue.get()) is not None:
            display.line(news) if isinstance(news, str) else display.advance_to(news)

    shower = threading.Thread(target=show, daemon=True)
    shower.start()
    try:
        yield _RemoteDisplay(queue)
    finally:
        queue.put(None)
        shower.join()
        queue.shutdown()


def _train_together(recipe: TrainRecipe, out: Path, device: torch.device, display: _RemoteDisplay) -> bool:
    gpu = device.type == "cuda"
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"recipe": recipe, "out": str(out), "folder": os.getcwd(), "display": display},
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
    Trainer(recipe, Path(config["out"]), ray.train.torch.get_device()).run(config["display"])


@contextlib.contextmanager
def _claimed(out: Path, recipe: TrainRecipe) -> Iterator[None]:
    """A folder that no other run writes to, and that has learned nothing yet, or with this recipe. Raises RunError."""
    check_start(recipe, out)
    folder = Store(str(out))
    with folder.lock():
        folder.clear_temporaries()
        if folder.exists(RECIPE) and (checkpoints(out / CHECKPOINTS) or (out / PIPELINE).exists()):
            check_same_run(out, read_recipe(out), recipe)
        elif recipe.init_from is not None:
            trained_model(Path(recipe.init_from))
        folder.put(RECIPE, recipe.model_dump_json(indent=1).encode())
        (out / STOP).unlink(missing_ok=True)
        yield


def _device(recipe: TrainRecipe) -> torch.device:
    wanted = recipe.run.device
    if wanted == "cuda" and not torch.cuda.is_available() and recipe.run.workers == 1:
        raise RunError("run.device: cuda, and this machine has no GPU that PyTorch can use; set run.device=auto")
    has = torch.cuda.is_available() or wanted == "cuda"
    return torch.device("cuda" if has and wanted != "cpu" else "cpu")


@contextlib.contextmanager
def _sigterm_saves(stop: Path) -> Iterator[None]:
    """SIGTERM during this block makes the file `stop`, and takes effect when the block ends."""
    came = False

    def save(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        stop.touch()

    before = signal.signal(signal.SIGTERM, save)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)
