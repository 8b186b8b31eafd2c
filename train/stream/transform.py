"""What the trainer learns from: a random cut of the image, and the subjects in it."""

from __future__ import annotations

from typing import TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from datapipe.schema import Entity
from subject_diffusion.settings import Settings
from train.stream.reader import BatchBase
from train.stream.tar_sample import RawSample


class SubjectExample(TypedDict):
    """A cut of an image, of height H and width W, and M slots for subjects, of which the first are filled."""

    image: NDArray[np.uint8]
    """(3, H, W) RGB."""
    caption: str
    tags: list[str]
    """M of them, "" where there is no subject."""
    boxes: NDArray[np.float32]
    """(M, 4) xyxy, fractions of the cut."""
    masks: NDArray[np.bool_]
    """(M, H, W)."""
    present: NDArray[np.bool_]
    """(M,): which slots hold a subject."""
    entities: NDArray[np.int64]
    """(M,): each subject's place among those of the annotation, -1 where there is no subject."""
    original_size: NDArray[np.int64]
    """(2,): height and width of the stored image, pixels: the detail that it has, whatever the size of the cut."""
    crop_top_left: NDArray[np.int64]
    """(2,): y and x of the cut in the resized image, pixels."""


class SubjectBatch(BatchBase):
    """B examples, collated: what is an array in one is a tensor here, with B before its dimensions."""

    image: Tensor
    caption: list[str]
    tags: list[list[str]]
    boxes: Tensor
    masks: Tensor
    present: Tensor
    entities: Tensor
    original_size: Tensor
    crop_top_left: Tensor


class SubjectTransform(Settings):
    """The image is resized until it just covers a square of `size_px`, or the shape that the sample's batch has, and a
    random cut of it that holds every subject is taken; where none does, the one in the middle (released code). Of the
    subjects that show in it at most `max_subjects` are chosen.
    """

    size_px: int = Field(512, ge=8)
    """Side of the square, where the stream has no buckets."""
    max_subjects: int = Field(2, ge=1)
    """The paper's training: two."""
    min_visible: float = Field(0.5, gt=0, le=1)
    """Share of a subject's box that must lie in the cut."""
    drop_subjects: float = Field(0.0, ge=0, le=1)
    """How often fewer subjects are chosen than could be, any number from one on. The caption names the others all the
    same, so that a model learns to draw what has no reference beside what has one."""

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> SubjectExample:
        sample = raw.annotation()
        height, width = raw.shape or (self.size_px, self.size_px)
        size = np.array([width, height])
        scale = max(width / sample.width, height / sample.height)
        # The decoder may have halved the image; boxes are in pixels of the stored one.
        whole = (max(round(sample.width * scale), width), max(round(sample.height * scale), height))
        boxes = np.array([e.box for e in sample.entities]).reshape(-1, 4) * scale
        corner = _corner(boxes, size, np.array(whole), rng)
        boxes = boxes - np.tile(corner, 2)
        shown = [i for i, box in enumerate(boxes) if _visible(box, size) >= self.min_visible]
        chosen = [shown[i] for i in np.sort(rng.permutation(len(shown))[: self._most(len(shown), rng)])]
        entities = [sample.entities[i] for i in chosen]
        missing = self.max_subjects - len(chosen)

        def cut(pixels: NDArray[np.uint8], shrinking: int) -> NDArray[np.uint8]:
            x, y = corner
            return _resized(pixels, whole, shrinking)[y : y + height, x : x + width]

        def mask(entity: Entity) -> NDArray[np.bool_]:
            if entity.mask is None:
                return np.zeros((height, width), bool)
            return cut(entity.mask.array().view(np.uint8), cv2.INTER_NEAREST).astype(bool)

        return {
            "image": cut(raw.image(min(whole)), cv2.INTER_AREA).transpose(2, 0, 1),
            "caption": sample.caption,
            "tags": [e.tag for e in entities] + [""] * missing,
            "boxes": np.array(
                [np.clip(boxes[i] / np.tile(size, 2), 0, 1) for i in chosen] + [[0] * 4] * missing, np.float32
            ),
            "masks": np.array([mask(e) for e in entities] + [np.zeros((height, width), bool)] * missing),
            "present": np.arange(self.max_subjects) < len(chosen),
            "entities": np.array(chosen + [-1] * missing, np.int64),
            "original_size": np.array([sample.height, sample.width], np.int64),
            "crop_top_left": np.array(corner[::-1], np.int64),
        }

    def _most(self, shown: int, rng: np.random.Generator) -> int:
        """How many of the subjects that show are chosen, at most."""
        most = min(shown, self.max_subjects)
        if most < 2 or self.drop_subjects == 0 or rng.random() >= self.drop_subjects:
            return most
        return int(rng.integers(1, most))


def _corner(
    boxes: NDArray[np.float64], size: NDArray[np.int64], whole: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """x and y of a cut of `size` in an image of `whole`, both (width, height); boxes: (N, 4) xyxy, pixels of that
    image."""
    last = whole - size
    if not len(boxes):
        return rng.integers(0, last, endpoint=True)
    least = np.maximum(np.ceil(boxes[:, 2:].max(axis=0)) - size, 0).astype(np.int64)
    most = np.minimum(np.floor(boxes[:, :2].min(axis=0)), last).astype(np.int64)
    return last // 2 if (least > most).any() else rng.integers(least, most, endpoint=True)


def _visible(box: NDArray[np.float64], size: NDArray[np.int64]) -> float:
    """Share of a box, in pixels of the cut, that lies in it. size: its width and height."""
    inside = np.clip(box, 0, np.tile(size, 2))
    area, shown = (float(np.prod(np.maximum(b[2:] - b[:2], 0))) for b in (box, inside))
    return shown / area if area else 0.0


def _resized(pixels: NDArray[np.uint8], whole: tuple[int, int], shrinking: int) -> NDArray[np.uint8]:
    """(H, W[, 3]) resized to `whole` (width, height). shrinking: OpenCV's interpolation where it becomes smaller."""
    if pixels.shape[1::-1] == whole:
        return pixels
    grows = pixels.shape[1] < whole[0] and shrinking == cv2.INTER_AREA
    return np.asarray(cv2.resize(pixels, whole, interpolation=cv2.INTER_CUBIC if grows else shrinking), np.uint8)
