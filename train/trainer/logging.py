"""The log of a run: a bar or lines in the terminal, TensorBoard, and Weights & Biases where the recipe asks for it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from subject_diffusion.errors import RunError
from train.trainer.recipe import TrainRecipe
from train.trainer.run_folder import WANDB_ID
from train.trainer.run_storage import RunStorage


class ProgressDisplay(Protocol):
    """What whoever started a run sees of it."""

    def advance_to(self, step: int) -> None: ...

    def line(self, text: str) -> None: ...


class TerminalProgress:
    """A bar, and lines above it; lines alone where stderr is no terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance_to(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def line(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def terminal_progress(steps: int, verb: str = "train") -> Iterator[TerminalProgress]:
    """steps: of the whole run. verb: what is done."""
    console = Console(stderr=True)
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield TerminalProgress(progress, progress.add_task(verb, total=steps))


class RunLogger:
    """The log of the first rank; that of the others discards everything."""

    def __init__(self, display: ProgressDisplay | None, writer: SummaryWriter | None, wandb: Any) -> None:
        self._display, self._writer, self._wandb = display, writer, wandb

    def advance_to(self, step: int) -> None:
        if self._display is not None:
            self._display.advance_to(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """values: such as "loss/diffusion"."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        shown = "  ".join(f"{name.split('/')[-1]} {value:.3g}" for name, value in values.items())
        self.line(f"step {step}  {shown}")

    def image(self, step: int, image: Image.Image) -> None:
        if self._writer is not None:
            self._writer.add_image("validation", np.asarray(image), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"validation": wandb.Image(image)}, step=step)

    def line(self, text: str) -> None:
        if self._display is not None:
            self._display.line(text)


@contextmanager
def run_logger(
    recipe: TrainRecipe, storage: RunStorage, start: int, first_rank: bool, display: ProgressDisplay | None
) -> Iterator[RunLogger]:
    """start: the step that the run goes on from. Raises RunError."""
    if not first_rank:
        yield RunLogger(None, None, None)
        return
    with contextlib.ExitStack() as resources:
        # What a killed run logged after its last checkpoint is computed again.
        events = storage.local / "tensorboard"
        writer = SummaryWriter(str(events), purge_step=start)
        resources.callback(storage.publish, events)
        resources.callback(writer.close)
        wandb = _wandb(recipe, recipe.run.wandb_project, storage, resources) if recipe.run.wandb_project else None
        logger = RunLogger(display, writer, wandb)
        logger.advance_to(start)
        yield logger


class MeansSinceLastLine:
    """Means of figures over the steps since the last line of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means of what was added since the last call."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means


def _wandb(recipe: TrainRecipe, project: str, storage: RunStorage, resources: contextlib.ExitStack) -> Any:
    """The run of this folder, whose id is kept there: a run of the same name in another folder is another one."""
    try:
        import wandb
    except ImportError:
        raise RunError("run.wandb_project is set, but wandb is not installed: .venv/bin/pip install wandb") from None
    store = storage.store
    if not store.exists(WANDB_ID):
        store.put(WANDB_ID, secrets.token_hex(8).encode())
    identity, name = store.read(WANDB_ID).decode(), store.root.rsplit("/", 1)[-1]
    config = recipe.model_dump(mode="json")
    try:
        run = wandb.init(project=project, name=name, dir=str(storage.local), resume="allow", id=identity, config=config)
    except wandb.errors.Error as error:
        raise RunError(f"run.wandb_project: {error}") from None
    resources.callback(run.finish)
    return run
