"""The log of a run: a bar or lines in the terminal, TensorBoard, and Weights & Biases where the recipe asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from subject_diffusion.errors import RunError


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
def terminal_progress(steps: int) -> Iterator[TerminalProgress]:
    """steps: of the whole run."""
    console = Console(stderr=True)
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield TerminalProgress(progress, progress.add_task("train", total=steps))


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
    out: Path, start: int, first_rank: bool, wandb_project: str | None, display: ProgressDisplay | None
) -> Iterator[RunLogger]:
    """start: the step that the run goes on from. Raises RunError."""
    if not first_rank:
        yield RunLogger(None, None, None)
        return
    with contextlib.ExitStack() as resources:
        # What a killed run logged after its last checkpoint is computed again.
        writer = SummaryWriter(str(out / "tensorboard"), purge_step=start)
        resources.callback(writer.close)
        logger = RunLogger(display, writer, _wandb(wandb_project, out, resources) if wandb_project else None)
        logger.advance_to(start)
        yield logger


def _wandb(project: str, out: Path, resources: contextlib.ExitStack) -> Any:
    try:
        import wandb
    except ImportError:
        raise RunError("run.wandb_project is set, but wandb is not installed: .venv/bin/pip install wandb") from None
    try:
        run = wandb.init(project=project, name=out.name, dir=str(out), resume="allow", id=out.name)
    except wandb.errors.Error as error:
        raise RunError(f"run.wandb_project: {error}") from None
    resources.callback(run.finish)
    return run
