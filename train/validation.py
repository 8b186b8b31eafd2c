"""The grid of pictures that a run leaves behind: each row a case, reference | boxes | sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw

from model import SubjectDiffusionPipeline, prepare_reference
from train.cases import Case
from train.recipe import ValidationSettings

_GAP = 4
_TOGETHER = 8
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231")


def draw_samples(
    pipeline: SubjectDiffusionPipeline, cases: Sequence[Case], settings: ValidationSettings
) -> list[Image.Image]:
    """One sample a case, of its image's size; each from a seed of its own."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(cases), _TOGETHER):
        some = cases[start : start + _TOGETHER]
        images += pipeline(
            [case.caption for case in some],
            subjects=[case.subjects for case in some],
            height=some[0].image.height,
            width=some[0].image.width,
            generator=generators(start, len(some)),
            **settings.sampling(),
        ).images
    return images


def draw_base(base: Any, cases: Sequence[Case], settings: ValidationSettings) -> list[Image.Image]:
    """By a StableDiffusionPipeline from the captions alone, from the noise that `draw_samples` starts from."""
    base.set_progress_bar_config(disable=True)
    guidance = settings.sampling()
    del guidance["subject_guidance_scale"]
    images: list[Image.Image] = []
    for start in range(0, len(cases), _TOGETHER):
        some = cases[start : start + _TOGETHER]
        images += base(
            [case.caption for case in some],
            height=some[0].image.height,
            width=some[0].image.width,
            generator=generators(start, len(some)),
            **guidance,
        ).images
    return images


def generators(first: int, count: int) -> list[torch.Generator]:
    """On the CPU, so that every device draws the same noise."""
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def grid(cases: Sequence[Case], columns: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """A row a case: its references side by side on white, its boxes over the image that they come from, and its
    picture of each column."""
    side = cases[0].image.height
    most = max(len(case.subjects) for case in cases)
    width = most + 1 + len(columns)
    sheet = Image.new("RGB", ((side + _GAP) * width - _GAP, (side + _GAP) * len(cases) - _GAP), "white")
    for row, case in enumerate(cases):
        references = [prepare_reference(s.image, s.mask_array(), side) for s in case.subjects]
        places = dict(enumerate(references)) | dict(enumerate([_boxes(case), *(c[row] for c in columns)], most))
        for column, picture in places.items():
            sheet.paste(picture, (column * (side + _GAP), row * (side + _GAP)))
    return sheet


def _boxes(case: Case) -> Image.Image:
    picture = Image.blend(case.image, Image.new("RGB", case.image.size, "white"), 0.5)
    draw = ImageDraw.Draw(picture)
    for k, subject in enumerate(case.subjects):
        assert subject.box is not None
        x1, y1, x2, y2 = (round(v * side) for v, side in zip(subject.box, picture.size * 2, strict=True))
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=_COLOURS[k % len(_COLOURS)], width=2)
        draw.text((x1 + 3, y1 + 1), subject.tag, fill="black")
    return picture
