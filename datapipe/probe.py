"""One image goes through every model before the run, so that what is wrong with a model costs no download; and where a
model may have any micro-batch, it is tried which one its GPU takes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image, ImageDraw

from datapipe.backends.loading import ModelSettings, device_of
from datapipe.batch_size import MOST, find_batch
from datapipe.recipe import Recipe, build_stage
from datapipe.schema import Entity, Outcome, Sample, StageName, Tag
from datapipe.stages.stage import Overlapping, Stage
from subject_diffusion.errors import BackendError, one_line

CAPTION = "a photo of a cat"
SIZE = (320, 240)
"""(width, height) in pixels."""
LARGE_SIZE = (1600, 800)
"""(width, height) of the images that a micro-batch is tried with. Most of the web's are less wide, and so take the
detector less memory; for others the batch is halved."""
MANY_BOXES = 8
"""Boxes of each: the most that `select` lets through by default."""
SHARE_OF_MEMORY = 0.9
"""How much of its part of the GPU an actor may use while micro-batches are tried; the rest is for images that need
more than those."""


@dataclass(frozen=True)
class Answer:
    """How a stage did before the run. `took_s`: for one image; `micro_batch`: what was found, None where nothing was
    tried."""

    took_s: float
    micro_batch: int | None = None


def ask(recipe: Recipe, stages: Sequence[StageName], gpus: float = 0.0, at_once: int = 1) -> dict[StageName, Answer]:
    """Builds the stages as a worker does, and asks each about one drawn image. A stage whose micro-batch is auto and
    whose model is on a GPU is then tried with more images.

    A stage of the user's own is only built, because what it can be asked is not known here. Raises BackendError.

    gpus, at_once: of the actor, as in `run.pools` and for `run_stage`.
    """
    # All of them, because an actor has all their models in memory.
    built = {name: build_stage(name, recipe) for name in recipe.with_custom(stages)}
    answers: dict[StageName, Answer] = {}
    for name, stage in built.items():
        if name is StageName.CUSTOM:
            continue
        started = time.monotonic()
        _ask(stage)
        took_s = time.monotonic() - started
        answers[name] = Answer(took_s, _tried(stage, gpus, at_once, recipe) if _is_to_try(recipe, name) else None)
    return answers


def _ask(stage: Stage) -> None:
    sample = probe_sample()
    try:
        (done,) = stage([sample])
    except Exception as error:  # a model of another kind raises whatever its code comes upon
        raise BackendError(
            f"{stage.name.value}: its model cannot answer on a test image: {type(error).__name__}: {one_line(error)}"
        ) from error
    if done.row != sample.row or (done.verdict is not None and done.verdict.outcome is Outcome.FAILED):
        raise BackendError(f"{stage.name.value}: does not answer on a test image: {done.verdict}")


def _is_to_try(recipe: Recipe, name: StageName) -> bool:
    block = recipe.stages()[name]
    return isinstance(block, ModelSettings) and block.micro_batch == "auto" and device_of(block).type == "cuda"


def _tried(stage: Stage, gpus: float, at_once: int, recipe: Recipe) -> int:
    """The micro-batch for a stage on a GPU, within the actor's part of its memory."""
    import torch

    torch.cuda.set_per_process_memory_fraction(SHARE_OF_MEMORY * min(gpus or 1.0, 1.0))
    return best_batch(stage, at_once, min(MOST, recipe.slice_rows // at_once))


def best_batch(stage: Stage, at_once: int, most: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """Tries a stage as an actor runs it: with several micro-batches under way, if it may. At most `most` images each.
    Raises BackendError when it has no memory for one image."""
    threads = at_once if isinstance(stage, Overlapping) else 1
    sample = probe_sample(LARGE_SIZE, MANY_BOXES)

    def label(batch: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(stage, [[sample] * batch] * threads))

    try:
        return find_batch(label, most, clock).batch
    except Exception as error:  # as above
        raise BackendError(
            f"{stage.name.value}: its model cannot answer on a test image of {' x '.join(map(str, LARGE_SIZE))} "
            f"pixels: {type(error).__name__}: {one_line(error)}"
        ) from error


def probe_sample(size: tuple[int, int] = SIZE, boxes: int = 1) -> Sample:
    """A drawn image of that (width, height) in pixels, with what every stage could have found in it."""
    width, height = size
    box = (width * 0.28, height * 0.21, width * 0.72, height * 0.79)
    image = Image.new("RGB", size, (120, 150, 90))
    ImageDraw.Draw(image).ellipse(box, fill=(200, 120, 40))
    sink = io.BytesIO()
    image.save(sink, "JPEG")
    start = CAPTION.index("cat")
    span = (start, start + len("cat"))
    return Sample(
        row=0,
        image=sink.getvalue(),
        width=width,
        height=height,
        original_width=width,
        original_height=height,
        alt_text=CAPTION,
        caption=CAPTION,
        tags=(Tag("cat", span),),
        candidates=(Entity("cat", span, box, 1.0, 1.0),) * boxes,
    )
