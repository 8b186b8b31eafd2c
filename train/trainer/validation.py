"""The grid of pictures that a run leaves behind: each row a case, reference | boxes | sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from model import SubjectDiffusionPipeline, prepare_reference
from train.evaluation.cases import Case
from train.trainer.recipe import ValidationSettings

GAP_PX = 4
"""Between the pictures of a grid."""
_TOGETHER = 8
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231")


def draw_samples(
    pipeline: SubjectDiffusionPipeline, cases: Sequence[Case], settings: ValidationSettings
) -> list[Image.Image]:
    """One sample per case, of its image's size; each from a seed of its own."""
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


def sampling_device(wanted: str) -> torch.device:
    """The GPU, where there is one and the run, by its `run.device`, would use it."""
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def grid(cases: Sequence[Case], columns: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """A row per case: its references side by side on white, its boxes over the image that they come from, and its
    picture of each column. `columns`: pictures of all cases by their heading."""
    side = cases[0].image.height
    most = max(len(case.subjects) for case in cases)
    references = ["reference"] if most == 1 else [f"reference {number}" for number in range(1, most + 1)]
    headings = [*references, "where to draw it", *columns]
    size = _fitting_size(headings, side - GAP_PX)
    font, head = ImageFont.load_default(size), round(1.5 * size)
    sheet = Image.new(
        "RGB", ((side + GAP_PX) * len(headings) - GAP_PX, head + (side + GAP_PX) * len(cases) - GAP_PX), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        pen.text((column * (side + GAP_PX) + 2, head // 2), heading, font=font, fill="black", anchor="lm")
    for row, case in enumerate(cases):
        cutouts = [prepare_reference(s.picture, s.mask_array(), side) for s in case.subjects]
        drawn = [_boxes(case), *(pictures[row] for pictures in columns.values())]
        for column, picture in (dict(enumerate(cutouts)) | dict(enumerate(drawn, most))).items():
            sheet.paste(picture, (column * (side + GAP_PX), head + row * (side + GAP_PX)))
    return sheet


def _fitting_size(texts: Sequence[str], width: int) -> int:
    """The largest font size, from 6 to 16 px, in which no text is longer than `width` pixels."""
    sizes = (s for s in range(16, 6, -1) if max(map(ImageFont.load_default(s).getlength, texts)) <= width)
    return next(sizes, 6)


def _boxes(case: Case) -> Image.Image:
    picture = Image.blend(case.image, Image.new("RGB", case.image.size, "white"), 0.5)
    draw = ImageDraw.Draw(picture)
    for k, subject in enumerate(case.subjects):
        assert subject.box is not None
        x1, y1, x2, y2 = (round(v * side) for v, side in zip(subject.box, picture.size * 2, strict=True))
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=_COLORS[k % len(_COLORS)], width=2)
        draw.text((x1 + 3, y1 + 1), subject.tag, fill="black")
    return picture
