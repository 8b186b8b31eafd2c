"""What the trainer learns from: a random square of the image, and the subjects in it."""

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
    """A square of an image with side S and M slots for subjects, of which the first are filled."""

    image: NDArray[np.uint8]
    """(3, S, S) RGB."""
    caption: str
    tags: list[str]
    """M of them, "" where there is no subject."""
    boxes: NDArray[np.float32]
    """(M, 4) xyxy, fractions of the square."""
    masks: NDArray[np.bool_]
    """(M, S, S)."""
    present: NDArray[np.bool_]
    """(M,): which slots hold a subject."""
    entities: NDArray[np.int64]
    """(M,): each subject's place among those of the annotation, -1 where there is no subject."""


class SubjectBatch(BatchBase):
    """B examples, collated: what is an array in one is a tensor here, with B before its dimensions."""

    image: Tensor
    caption: list[str]
    tags: list[list[str]]
    boxes: Tensor
    masks: Tensor
    present: Tensor
    entities: Tensor


class SubjectTransform(Settings):
    """The image's shorter side becomes `size_px`, and a random square that holds every subject is cut out; where none
    does, the one in the middle (released code). Of the subjects that show in it at most `max_subjects` are drawn.
    """

    size_px: int = Field(512, ge=8)
    max_subjects: int = Field(2, ge=1)
    """The paper's training: two."""
    min_visible: float = Field(0.5, gt=0, le=1)
    """Share of a subject's box that must lie in the square."""

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> SubjectExample:
        sample = raw.annotation()
        scale = self.size_px / min(sample.width, sample.height)
        # The decoder may have halved the image; boxes are in pixels of the stored one.
        whole = (max(round(sample.width * scale), self.size_px), max(round(sample.height * scale), self.size_px))
        boxes = np.array([e.box for e in sample.entities]).reshape(-1, 4) * scale
        corner = self._corner(boxes, whole, rng)
        boxes = boxes - np.tile(corner, 2)
        shown = [i for i, box in enumerate(boxes) if self._visible(box) >= self.min_visible]
        chosen = [shown[i] for i in np.sort(rng.permutation(len(shown))[: self.max_subjects])]
        entities = [sample.entities[i] for i in chosen]
        missing = self.max_subjects - len(chosen)
        masks = [self._mask(e, whole, corner) for e in entities]
        return {
            "image": self._square(raw.image(self.size_px), whole, corner, cv2.INTER_AREA).transpose(2, 0, 1),
            "caption": sample.caption,
            "tags": [e.tag for e in entities] + [""] * missing,
            "boxes": np.array(
                [np.clip(boxes[i] / self.size_px, 0, 1) for i in chosen] + [[0] * 4] * missing, np.float32
            ),
            "masks": np.array(masks + [np.zeros((self.size_px, self.size_px), bool)] * missing),
            "present": np.arange(self.max_subjects) < len(chosen),
            "entities": np.array(chosen + [-1] * missing, np.int64),
        }

    def _corner(
        self, boxes: NDArray[np.float64], whole: tuple[int, int], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """x and y of the square in an image of `whole` (width, height); boxes: (N, 4) xyxy, pixels of that image."""
        last = np.array(whole) - self.size_px
        if not len(boxes):
            return rng.integers(0, last, endpoint=True)
        least = np.maximum(np.ceil(boxes[:, 2:].max(axis=0)) - self.size_px, 0).astype(np.int64)
        most = np.minimum(np.floor(boxes[:, :2].min(axis=0)), last).astype(np.int64)
        return last // 2 if (least > most).any() else rng.integers(least, most, endpoint=True)

    def _visible(self, box: NDArray[np.float64]) -> float:
        """Share of a box, in pixels of the square, that lies in it."""
        area, inside = (float(np.prod(np.maximum(b[2:] - b[:2], 0))) for b in (box, np.clip(box, 0, self.size_px)))
        return inside / area if area else 0.0

    def _mask(self, entity: Entity, whole: tuple[int, int], corner: NDArray[np.int64]) -> NDArray[np.bool_]:
        if entity.mask is None:
            return np.zeros((self.size_px, self.size_px), bool)
        full = entity.mask.array().view(np.uint8)
        return self._square(full, whole, corner, cv2.INTER_NEAREST).astype(bool)

    def _square(
        self, pixels: NDArray[np.uint8], whole: tuple[int, int], corner: NDArray[np.int64], shrinking: int
    ) -> NDArray[np.uint8]:
        """(H, W[, 3]) resized to `whole` (width, height), and the square at `corner` (x, y) cut out. `shrinking`:
        OpenCV's interpolation where it becomes smaller."""
        if pixels.shape[1::-1] != whole:
            grows = pixels.shape[1] < whole[0] and shrinking == cv2.INTER_AREA
            resized = cv2.resize(pixels, whole, interpolation=cv2.INTER_CUBIC if grows else shrinking)
            pixels = np.asarray(resized, np.uint8)
        x, y = corner
        return pixels[y : y + self.size_px, x : x + self.size_px]
