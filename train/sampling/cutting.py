"""Subjects cut out of pictures that come without a mask."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datapipe.recipe import Recipe, build_stage
from datapipe.schema import Entity, Sample, StageName, Tag
from subject_diffusion.errors import RunError
from train.sampling.request import Box, Point

Mask = NDArray[np.bool_]

CLICK_SHARES = (0.15, 0.25, 0.4, 0.6, 0.85)
"""Sides of the squares around a click that are tried as prompts, as shares of the picture's longer side."""


class Cutter:
    """A dataset recipe's detector and segmenter. The segmenter is prompted by boxes alone, as it is when datasets are
    made: not every segmenter here has learned points."""

    def __init__(self, recipe: Recipe) -> None:
        self._ground, self._segment = (build_stage(name, recipe) for name in (StageName.GROUND, StageName.SEGMENT))
        self._min_score = recipe.select.min_score
        self._takes_boxes = recipe.segment.backend != "grounded"

    def __call__(self, picture: Image.Image, tag: str, at: Point | Box | None) -> Mask | None:
        """The mask (H, W) of a subject: inside a box, 0..1; or under a point; or the largest that the detector calls
        by the tag. None where there is none. Raises RunError where the recipe's segmenter takes no boxes."""
        size = picture.size
        if at is not None and len(at) == 4:
            found = self._masked(picture, tag, [_in_pixels(at, size)])
        else:
            named = self._detected(picture, tag) if tag else []
            found = [e for e in named if at is None or _covers(e, at)]
            if at is not None and not found:
                tried = self._masked(picture, tag, [_in_pixels(box, size) for box in around(at, size)])
                found = [e for e in tried if _covers(e, at)]
        return _array(max(found, key=_area if at is None else _certainty)) if found else None

    def _detected(self, picture: Image.Image, tag: str) -> list[Entity]:
        sample = _sample(picture, tag)
        (sample,) = self._ground([sample])
        (sample,) = self._segment([sample])
        likely = [c for c in sample.candidates if c.score >= self._min_score]
        return [c for c in likely if c.mask is not None and _array(c).any()]

    def _masked(self, picture: Image.Image, tag: str, boxes: Sequence[Box]) -> list[Entity]:
        if not self._takes_boxes:
            raise RunError("a click or box needs a segmenter of its own, which SAM 3 is not here; take --labels modern")
        candidates = tuple(Entity(tag, (0, len(tag)), box, 1.0, 1.0) for box in boxes)
        (sample,) = self._segment([_sample(picture, tag).replace(candidates=candidates)])
        return [c for c in sample.candidates if c.mask is not None and _array(c).any()]


def around(point: Sequence[float], size: tuple[int, int]) -> list[Box]:
    """Squares of several sizes around a point, cut off at the picture's sides; 0..1. size: (width, height), pixels."""
    x, y = point[0], point[1]
    longer = max(size)
    halves = [(share * longer / size[0] / 2, share * longer / size[1] / 2) for share in CLICK_SHARES]
    return [(max(0, x - w), max(0, y - h), min(1, x + w), min(1, y + h)) for w, h in halves]


def _sample(picture: Image.Image, tag: str) -> Sample:
    sink = io.BytesIO()
    picture.convert("RGB").save(sink, "PNG", compress_level=1)
    width, height = picture.size
    tags = (Tag(tag, (0, len(tag))),)
    return Sample(row=0, image=sink.getvalue(), width=width, height=height, caption=tag, tags=tags)


def _in_pixels(box: Sequence[float], size: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = box
    return x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]


def _array(entity: Entity) -> Mask:
    assert entity.mask is not None
    return entity.mask.array()


def _area(entity: Entity) -> int:
    return int(_array(entity).sum())


def _certainty(entity: Entity) -> float:
    return entity.score * (entity.predicted_iou or 0.0) * (entity.stability or 0.0)


def _covers(entity: Entity, point: Sequence[float]) -> bool:
    mask = _array(entity)
    row, column = (min(int(v * side), side - 1) for v, side in zip((point[1], point[0]), mask.shape, strict=True))
    return bool(mask[row, column])
