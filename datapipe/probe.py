"""One image goes through every model before the run, so that what is wrong with a model costs no download; and where
settings are auto, it is tried with which values its GPU is fastest."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from PIL import Image, ImageDraw

from datapipe.backends.loading import CompilableSettings, ModelSettings, device_of
from datapipe.recipe import Recipe, build_stage
from datapipe.schema import Entity, Outcome, Sample, StageName, Tag
from datapipe.stages.stage import Compilable, Overlapping, Stage
from datapipe.tuning import MOST, Speed, compiling_pays, find_batch, measure
from subject_diffusion.errors import BackendError, one_line

CAPTION = "a photo of a cat"
SIZE = (320, 240)
"""(width, height) in pixels."""
LARGE_SIZE = (1600, 800)
"""(width, height) of the images that a micro-batch is tried with. Most of the web's are less wide, and so take the
detector less memory; for others the batch is halved."""
MANY_BOXES = 8
"""Boxes of each: the most that `select` lets through by default."""
LEAST_WORTH_COMPILING_S = 60.0
"""Seconds of work below which a model is not compiled: compiling alone takes about as long."""
SHARE_OF_MEMORY = 0.9
"""How much of its part of the GPU an actor may use while micro-batches are tried; the rest is for images that need
more than those."""


@dataclass(frozen=True)
class Answer:
    """How a stage did before the run. `took_s`: for one image; `found`: values for its settings that are auto;
    `remark`: what a person should know of that."""

    took_s: float
    found: Mapping[str, int] = field(default_factory=dict)
    remark: str = ""


def ask(
    recipe: Recipe, stages: Sequence[StageName], gpus: float = 0.0, at_once: int = 1, rows: int = 0
) -> dict[StageName, Answer]:
    """Builds the stages as a worker does, and asks each about one drawn image. A stage whose model is on a GPU is then
    tried with other values of its settings that are auto.

    A stage of the user's own is only built, because what it can be asked is not known here. Raises BackendError.

    gpus, at_once: of the actor, as in `run.pools` and for `run_stage`; rows: that it will see.
    """
    # All of them, because an actor has all their models in memory.
    built = {name: build_stage(name, recipe) for name in recipe.with_optional(stages)}
    answers: dict[StageName, Answer] = {}
    for name, stage in built.items():
        if name is StageName.CUSTOM:
            continue
        started = time.monotonic()
        _ask(stage)
        answers[name] = Answer(time.monotonic() - started)
        block = recipe.stages()[name]
        if isinstance(block, ModelSettings) and block.computes_here and device_of(block).type == "cuda":
            _limit_memory(gpus)
            found, remark = tune(stage, block, at_once, min(MOST, recipe.slice_rows // at_once), rows)
            answers[name] = replace(answers[name], found=found, remark=remark)
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


def _limit_memory(gpus: float) -> None:
    """To the actor's part of its GPU, `gpus`."""
    import torch

    torch.cuda.set_per_process_memory_fraction(SHARE_OF_MEMORY * min(gpus or 1.0, 1.0))


def tune(
    stage: Stage,
    block: ModelSettings,
    at_once: int,
    most: int,
    rows: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, int], str]:
    """Finds values for the settings of `block` that are auto, and a remark for a person, or "". Raises BackendError
    when the model has no memory for one image.

    The stage is tried as an actor runs it: with `at_once` micro-batches under way, if it may.

    most: images in a micro-batch; rows: that the actor will see.
    """
    threads = at_once if isinstance(stage, Overlapping) else 1
    sample = probe_sample(LARGE_SIZE, MANY_BOXES)

    def label(batch: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(stage, [[sample] * batch] * threads))

    found: dict[str, int] = {}
    try:
        if block.micro_batch == "auto":
            speed = find_batch(label, most, clock)
            found["micro_batch"] = speed.batch
        else:
            speed = measure(label, block.micro_batch, clock)
    except Exception as error:  # as above
        raise BackendError(
            f"{stage.name.value}: its model cannot answer on a test image of {' x '.join(map(str, LARGE_SIZE))} "
            f"pixels: {type(error).__name__}: {one_line(error)}"
        ) from error
    remark = ""
    if isinstance(stage, Compilable) and isinstance(block, CompilableSettings) and block.compile == "auto":
        found["compile"] = False
        try:
            found["compile"] = _compiling_pays(stage, label, speed, rows // threads, clock)
        except Exception as error:  # compilers raise almost any class, and the model runs without them
            remark = f"{stage.name.value}: runs without torch.compile: {type(error).__name__}: {one_line(error)}"
    return found, remark


def _compiling_pays(
    stage: Compilable, label: Callable[[int], None], plain: Speed, rows: int, clock: Callable[[], float]
) -> bool:
    """Whether `rows` images end earlier with the stage's model compiled first. Few rows are not worth the try."""
    if rows / plain.images_per_s < LEAST_WORTH_COMPILING_S:
        return False
    started = clock()
    stage.compile()
    label(plain.batch)
    took_s = clock() - started
    return compiling_pays(plain, measure(label, plain.batch, clock), took_s, rows)


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
