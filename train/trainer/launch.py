"""A recipe becomes a run: in this process, or in several, one per GPU, placed by Ray Train or started by torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue
from torch import distributed

from datapipe.cluster import connected, has_room, nodes, on_this_node, resources
from datapipe.placing import described
from datapipe.recipe import Pool
from datapipe.shards.store import Store
from subject_diffusion.errors import RunError, SddError
from train.trainer.logging import ProgressDisplay, terminal_progress
from train.trainer.loop import Trainer
from train.trainer.parallel import barrier, rank_and_count
from train.trainer.pipeline import parsed_recipe
from train.trainer.recipe import TrainRecipe
from train.trainer.resume import check_same_run
from train.trainer.run_folder import PIPELINE, RECIPE, STOP, check_start, trained_model
from train.trainer.run_storage import RunStorage


def train(recipe: TrainRecipe, out: str | Path, ray_address: str | None = None) -> bool:
    """Trains, from the newest checkpoint in `out`, a folder or a bucket's URL, if there is one. Returns False when
    asked to stop before the end, by a file `stop` in `out`: what was learned is saved. So it is on SIGTERM, which then
    ends the process as it would have without this. Raises SddError."""
    if distributed.is_torchelastic_launched():
        return _train_as_rank(recipe, RunStorage(out))
    alone = recipe.run.workers == 1
    device = device_here(recipe) if alone else None
    storage = RunStorage(out)
    with _claimed(storage, recipe), terminal_progress(recipe.optimizer.steps) as display:
        if device is not None:
            _say_cpu(recipe, device, display)
            trainer = Trainer(recipe, out, device)
            with sigterm_calls(storage.ask_to_stop):
                return trainer.run(display)
        with connected(ray_address), _remote(display) as remote, sigterm_calls(storage.ask_to_stop):
            device = device_of_cluster(recipe, ray_address)
            _say_cpu(recipe, device, display)
            return _train_together(recipe, storage, device, ray_address, remote)


def train_inside(recipe: TrainRecipe, out: str | Path, ray_address: str | None, display: ProgressDisplay) -> bool:
    """As `train`, in a process of Ray's: where the run has one process, this is it."""
    storage = RunStorage(out)
    with _claimed(storage, recipe):
        if recipe.run.workers == 1:
            return Trainer(recipe, out, device_here(recipe)).run(display)
        with _remote(display) as remote:
            return _train_together(recipe, storage, device_of_cluster(recipe, ray_address), ray_address, remote)


def is_first() -> bool:
    """Whether this process speaks for the run: of those that torchrun starts, the first one does."""
    return os.environ.get("RANK", "0") == "0"


def _train_as_rank(recipe: TrainRecipe, storage: RunStorage) -> bool:
    """This process's part of a run that torchrun has started: it also restarts all of them when one dies."""
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks != recipe.run.workers:
        raise RunError(
            f"torchrun started {ranks} processes, and run.workers is {recipe.run.workers}; set it to {ranks}"
        )
    device = device_here(recipe)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with contextlib.ExitStack() as run:
        run.callback(distributed.destroy_process_group)
        display = None
        if is_first():
            run.enter_context(_claimed(storage, recipe))
            display = run.enter_context(terminal_progress(recipe.optimizer.steps))
            _say_cpu(recipe, device, display)
        barrier()  # the others begin when the folder is the run's
        trainer = Trainer(recipe, storage.store.root, device)
        run.enter_context(sigterm_calls(storage.ask_to_stop))
        return trainer.run(display)


class _RemoteDisplay:
    """The progress display of the process that started the run, for those that train, perhaps on other machines."""

    def __init__(self, queue: Queue, verdict: Any) -> None:
        self._queue, self._verdict = queue, verdict
        self._next_s = 0.0

    def advance_to(self, step: int) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + 0.5
            self._queue.put(step)

    def line(self, text: str) -> None:
        self._queue.put(text)

    def end_run(self, outcome: SddError | bool) -> None:
        """outcome: what the first rank's `Trainer.run` returned; or why the run cannot go on, and no other attempt
        could."""
        ray.get(self._verdict.set.remote(outcome))

    def check(self) -> bool:
        """Whether the run has come to its end. Raises what ended it before."""
        outcome: SddError | bool = ray.get(self._verdict.get.remote())
        if isinstance(outcome, SddError):
            raise outcome
        return outcome


class _Verdict:
    """How a run ended, kept from one attempt to the next."""

    def __init__(self) -> None:
        self._outcome: SddError | bool = False

    def set(self, outcome: SddError | bool) -> None:
        self._outcome = outcome

    def get(self) -> SddError | bool:
        return self._outcome


@contextlib.contextmanager
def _remote(display: ProgressDisplay) -> Iterator[_RemoteDisplay]:
    # Beside this process: other nodes may go away.
    here = {"num_cpus": 0, "scheduling_strategy": on_this_node()}
    queue, verdict = Queue(actor_options=here), ray.remote(_Verdict).options(**here).remote()

    def show() -> None:
        while (news := queue.get()) is not None:
            display.line(news) if isinstance(news, str) else display.advance_to(news)

    shower = threading.Thread(target=show, daemon=True)
    shower.start()
    try:
        yield _RemoteDisplay(queue, verdict)
    finally:
        queue.put(None)
        shower.join()
        queue.shutdown()


def _train_together(
    recipe: TrainRecipe, storage: RunStorage, device: torch.device, address: str | None, display: _RemoteDisplay
) -> bool:
    gpu = device.type == "cuda"
    out = storage.store.url
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"recipe": recipe, "out": out, "folder": os.getcwd(), "display": display},
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.run.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus_of_each(address)} | ({"GPU": 1} if gpu else {}),
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(storage.local.absolute() / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=recipe.run.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause: Any = getattr(failure, "cause", failure)
            if isinstance(cause, SddError):
                raise cause from None
        raise
    return display.check()


def _worker(config: dict[str, Any]) -> None:
    """What each process of a run does, and does again from the last checkpoint where one has died."""
    recipe: TrainRecipe = config["recipe"]
    display: _RemoteDisplay = config["display"]
    display.check()
    if os.path.isdir(config["folder"]):  # Ray's workers have a folder of their own, where relative paths lead nowhere
        os.chdir(config["folder"])
    try:
        first = rank_and_count()[0] == 0
        if first:
            _check_shared(recipe, config["out"])
        finished = Trainer(recipe, config["out"], ray.train.torch.get_device()).run(display)
        if first:
            display.end_run(finished)
    except SddError as error:
        display.end_run(error)
        raise


def _check_shared(recipe: TrainRecipe, out: str) -> None:
    """Whether the process that started the run and the first that trains see the same folder. Raises RunError."""
    store = Store(out)
    if not store.exists(RECIPE) or parsed_recipe(out, store.read(RECIPE)) != recipe:
        raise RunError(
            f"--out {out}: node {socket.gethostname()}, where the run begins, does not see this folder; name one that "
            "all nodes share, or a bucket"
        )


@contextlib.contextmanager
def _claimed(storage: RunStorage, recipe: TrainRecipe) -> Iterator[None]:
    """A folder that no other run writes to, and that has learned nothing yet, or is this run's. Raises RunError."""
    check_start(recipe)
    folder = storage.store
    with folder.lock():
        folder.clear_temporaries()
        if folder.exists(RECIPE) and (storage.checkpoints() or folder.exists(PIPELINE)):
            check_same_run(folder.root, parsed_recipe(folder.root, folder.read(RECIPE)), recipe)
        elif recipe.init_from is not None:
            trained_model(Path(recipe.init_from))
        folder.put(RECIPE, recipe.model_dump_json(indent=1).encode())
        folder.remove([STOP])
        yield


def device_here(recipe: TrainRecipe) -> torch.device:
    wanted = recipe.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("run.device: cuda, and this machine has no GPU that PyTorch can use; set run.device=auto")
    return torch.device("cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu")


def device_of_cluster(recipe: TrainRecipe, address: str | None) -> torch.device:
    """Where the processes of a run train: this machine may be a head without a GPU. Raises RunError where the cluster
    has no room for them."""
    wanted, workers = recipe.run.device, recipe.run.workers
    has_gpu = any(gpus for _, gpus in nodes())
    if address is not None and wanted == "auto" and not has_gpu:
        raise RunError(
            f"the cluster has no GPU ({resources()}); set run.device=cuda to wait for nodes that have, or "
            "run.device=cpu to train on CPUs"
        )
    gpu = wanted == "cuda" or (wanted == "auto" and has_gpu)
    asked = [Pool(stages=(), cpus=cpus_of_each(address), gpus=1 if gpu else 0)] * workers
    if not has_room(asked, address):
        raise RunError(
            f"run.workers asks for {described(asked)}, all at the same time, and there are {resources()}; lower "
            "run.workers, or add nodes"
        )
    return torch.device("cuda" if gpu else "cpu")


def cpus_of_each(address: str | None) -> float:
    """Cores of each process that trains. A machine of one's own may have fewer of them than processes."""
    return 0.5 if address is None else 1.0


def _say_cpu(recipe: TrainRecipe, device: torch.device, display: ProgressDisplay) -> None:
    if device.type == "cpu" and recipe.run.device == "auto":
        display.line("no GPU here: training on CPUs")


@contextlib.contextmanager
def sigterm_calls(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM during this block asks what runs to stop and save, and takes effect when the block ends."""
    came = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        ask_to_stop()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)
