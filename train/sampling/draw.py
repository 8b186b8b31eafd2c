"""Requests become pictures: references cut out, the pipeline loaded once, one picture drawn at a time, so that each
depends on its own seed alone and can be drawn again to the pixel."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from datapipe.recipe import Recipe
from datapipe.schema import RLE
from model import Subject, place
from subject_diffusion._version import __version__
from subject_diffusion.errors import RunError
from train.evaluation.pictures import open_picture
from train.sampling.checking import open_mask, own_mask, resolved, size_of, with_value
from train.sampling.cutting import Cutter, Mask
from train.sampling.drawing import Drawing, DrawnReference, DrawnSubject, already_drawn, file_digest
from train.sampling.request import AskedSubject, Reference, Request
from train.sampling.settings import Axis
from train.sampling.sheet import sheet
from train.sampling.trained import TrainedModel
from train.trainer.pipeline import open_pipeline
from train.trainer.validation import generators, sampling_device

OnStep = Callable[[], None]
"""Called after every step of a sampling."""
_DIGITS = 8
"""How many digits of a picture's hash stand in the names of those that would else take another's."""


@dataclass(frozen=True)
class Task:
    """A picture to be drawn, and its file."""

    request: Request
    seed: int
    path: Path
    asked: str


def tasks(
    requests: Sequence[Request], axes: Sequence[Axis], labels: Recipe, model: TrainedModel, digest: str, out: Path
) -> list[Task]:
    """The pictures that are not in `out` yet. What is there under a picture's name and is another one stays: the name
    then ends in the first digits of the picture's own hash. digest: of the model."""
    found = []
    for request in requests:
        files = [file_digest(name) for r in request.files() for name in (r.image, r.mask) if name is not None]
        what = request.model_dump(mode="json", exclude={"name", "seed", "images"})
        known: dict[str, Any] = {"files": files, "request": what, "axes": axes, "model": digest}
        known["settings"] = resolved(request, model, "").model_dump()
        known["labels"] = labels.model_dump(mode="json", include={"ground", "segment", "select"})
        for seed in range(request.seed, request.seed + request.images):
            asked = hashlib.sha256(json.dumps(known | {"seed": seed}, sort_keys=True).encode()).hexdigest()
            plain = out / file_name(request.name, seed, axes)
            own = plain.with_stem(f"{plain.stem}-{asked[:_DIGITS]}")
            if not any(already_drawn(path, asked) for path in (plain, own)):
                found.append(Task(request, seed, own if plain.exists() else plain, asked))
    return found


def file_name(name: str, seed: int | str, axes: Sequence[Axis]) -> str:
    return "-".join(filter(None, [name, "grid" if axes else "", f"seed-{seed}.png"]))


class Draftsman:
    """A loaded model that draws."""

    def __init__(self, model: TrainedModel, named: str, digest: str) -> None:
        """named: how the user calls the model's folder. Raises ModelError."""
        device = sampling_device(model.device)
        self.device = device.type
        self.pipeline = open_pipeline(model.folder).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self._model, self._named, self._digest = model, named, digest

    def drawing(self, task: Task, axes: Sequence[Axis], cut: Callable[[AskedSubject, Reference], RLE]) -> Drawing:
        """All that decides a task's picture. cut: a reference's mask. Raises SddError."""
        request = task.request
        height, width = size_of(request, self._model)
        subjects = [
            DrawnSubject(
                tag=asked.tag, box=asked.box, references=tuple(_drawn(asked, r, cut) for r in asked.references)
            )
            for asked in request.subjects
        ]
        boxes = place([as_subject(subject) for subject in subjects], height, width)
        return Drawing(
            version=__version__,
            torch=torch.__version__,
            device=self.device,
            threads=torch.get_num_threads(),
            model=self._named,
            model_sha256=self._digest,
            prompt=request.prompt,
            subjects=tuple(s.model_copy(update={"box": box}) for s, box in zip(subjects, boxes, strict=True)),
            seed=task.seed,
            height=height,
            width=width,
            settings=resolved(request, self._model, ""),
            axes=tuple(axes),
            asked=task.asked,
        )

    def draw(self, drawing: Drawing, on_step: OnStep) -> Image.Image:
        """The picture, or the sheet where there are axes. Raises ModelError."""
        subjects = [as_subject(subject) for subject in drawing.subjects]
        # The last axis, of the rows, varies slowest.
        keys = [key for key, _ in reversed(drawing.axes)]
        cells = itertools.product(*(values for _, values in reversed(drawing.axes)))
        pictures = [self._cell(drawing, subjects, dict(zip(keys, cell, strict=True)), on_step) for cell in cells]
        return sheet(pictures, drawing.axes) if drawing.axes else pictures[0]

    def _cell(
        self, drawing: Drawing, subjects: Sequence[Subject], changed: dict[str, float], on_step: OnStep
    ) -> Image.Image:
        settings = drawing.settings
        for key, value in changed.items():
            settings = with_value(settings, key, value)
        self.pipeline.set_subject_scale(settings.subject_scale)

        def step(*_: Any) -> dict[str, Any]:
            on_step()
            return {}

        picture: Image.Image = self.pipeline(
            drawing.prompt,
            subjects=subjects,
            height=drawing.height,
            width=drawing.width,
            generator=generators(drawing.seed, 1),
            callback_on_step_end=step,
            **settings.model_dump(exclude={"subject_scale"}),
        ).images[0]
        return picture


def steps(drawing: Drawing) -> int:
    """How many steps it takes to sample a picture, or all on a sheet."""
    axes = dict(drawing.axes)
    each = axes.pop("num_inference_steps", (drawing.settings.num_inference_steps,))
    return int(sum(each)) * math.prod(map(len, axes.values()))


def as_subject(subject: DrawnSubject) -> Subject:
    """The subject in the files named. Raises RunError."""
    pictures = [open_picture(Path(r.path)) for r in subject.references]
    return Subject(pictures, subject.tag, mask=[r.rle().array() for r in subject.references], box=subject.box)


def _drawn(asked: AskedSubject, reference: Reference, cut: Callable[[AskedSubject, Reference], RLE]) -> DrawnReference:
    rle = cut(asked, reference)
    return DrawnReference(
        path=reference.image, sha256=file_digest(reference.image), mask_size=rle.size, mask=rle.counts
    )


class Masks:
    """The mask of each reference: of its file, of its transparency, or as the recipe's models cut it out, which are
    loaded when the first is asked for."""

    def __init__(self, labels: Recipe) -> None:
        self._labels = labels
        self._cutter: Cutter | None = None
        self._found: dict[tuple[str, Reference], RLE] = {}

    def __call__(self, asked: AskedSubject, reference: Reference) -> RLE:
        """The mask of the upright picture. Raises RunError."""
        key = (asked.tag, reference)
        if key not in self._found:
            self._found[key] = RLE.of(self._of(asked.tag, reference))
        return self._found[key]

    def _of(self, tag: str, reference: Reference) -> Mask:
        if reference.mask is not None:
            return open_mask(reference.mask)
        picture = open_picture(Path(reference.image))
        own = own_mask(picture)
        if own is not None and reference.at is None:
            return own
        if self._cutter is None:
            self._cutter = Cutter(self._labels)
        found = self._cutter(picture, tag, reference.at)
        if found is None:
            raise RunError(
                f"{reference.image}: no {tag} was found there; say where it is with --at {tag}=X,Y or "
                f"{tag}=X1,Y1,X2,Y2, or give its mask with --mask {tag}=IMAGE"
            )
        return found
