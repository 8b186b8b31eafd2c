"""What the subject model learns from: the square that `SubjectTransform` cuts, a reference of each subject in it, and
all random draws of the training step, so that they are the sample's own wherever it is computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pydantic import Field

from datapipe.errors import RunError
from datapipe.settings import Settings
from model import ReferenceBackground, prepare_reference
from train.cache import ShardCache
from train.index import open_index
from train.pairs import Pairs
from train.reader import Source
from train.sample import RawSample
from train.transform import SubjectTransform

_WHITE = (255, 255, 255)
_PHOTOS = {".jpg", ".jpeg", ".png", ".webp"}


class ReferenceSettings(Settings):
    """How a reference is made of its subject. Subject and reference come from one image, so that a plain copy would be
    rewarded; what is drawn here counters it. Defaults: released code, but for the background."""

    background: ReferenceBackground = "white"
    """What is behind the subject. Released code: photo in training and white in sampling, a mismatch."""
    photos: str | None = None
    """Folder of pictures for `background: photo`."""
    scale: tuple[float, float] = (0.6, 1.0)
    """Least and greatest share of the canvas that the subject's longer side takes."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a mirror image."""
    rotation_degrees: float = Field(10.0, ge=0, le=180)
    """Turned by up to so much, either way."""
    perspective: float = Field(0.1, ge=0, lt=0.5)
    """Corners move inwards by up to this share of the side."""
    cross_image: float = Field(1.0, ge=0, le=1)
    """Probability that the reference is cut from another image of the same subject, where the dataset's
    `identities.parquet` (key, entity, identity) tells of one; the paper's data has none."""

    def __call__(
        self, image: NDArray[np.uint8], mask: NDArray[np.bool_], size_px: int, rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        """image: (H, W, 3) uint8 RGB; mask: (H, W) bool, not empty. Returns (3, size_px, size_px) uint8 RGB."""
        scale, *centre = rng.uniform((self.scale[0], 0, 0), (self.scale[1], 1, 1))
        photo = Image.open(_photos(self.photos)[int(rng.integers(2**31))]) if self.background == "photo" else None
        reference = prepare_reference(
            Image.fromarray(image),
            mask,
            size_px,
            background=self.background,
            photo=photo,
            scale=scale,
            centre=(centre[0], centre[1]),
        )
        border = cv2.BORDER_CONSTANT if self.background == "white" else cv2.BORDER_REFLECT
        warped = cv2.warpPerspective(
            np.asarray(reference), self._warp(size_px, rng), (size_px,) * 2, borderMode=border, borderValue=_WHITE
        )
        return np.asarray(warped, np.uint8).transpose(2, 0, 1)

    def _warp(self, size_px: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """(3, 3), where each pixel of the canvas goes."""
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32) * size_px
        inwards = np.sign(size_px / 2 - corners) * rng.uniform(0, self.perspective, (4, 2)) * size_px
        perspective = cv2.getPerspectiveTransform(corners, (corners + inwards).astype(np.float32))
        turn = np.eye(3)
        turn[:2] = cv2.getRotationMatrix2D((size_px / 2,) * 2, rng.uniform(-1, 1) * self.rotation_degrees, 1.0)
        mirror = np.array([[-1, 0, size_px - 1], [0, 1, 0], [0, 0, 1]]) if rng.random() < self.flip else np.eye(3)
        return np.asarray(perspective @ turn @ mirror, np.float64)


class _Photos:
    """The pictures of a folder, by any number."""

    def __init__(self, folder: str) -> None:
        self._paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in _PHOTOS)
        if not self._paths:
            raise RunError(f"examples.reference.photos: no pictures in {folder}")

    def __getitem__(self, number: int) -> Path:
        return self._paths[number % len(self._paths)]


@functools.cache
def _photos(folder: str | None) -> _Photos:
    if folder is None:
        raise RunError("examples.reference.background: photo needs a folder of pictures in examples.reference.photos")
    return _Photos(folder)


class ExampleSettings(Settings):
    """What is cut from a sample."""

    size_px: int = Field(512, ge=8)
    """Side of the square that is learnt."""
    min_visible: float = Field(0.5, gt=0, le=1)
    """Share of a subject's box that must lie in the square."""
    reference: ReferenceSettings = ReferenceSettings()


def check_entities(sources: Sequence[Source], cache: ShardCache) -> None:
    """Raises RunError where a filter leaves images without any subject: there would be no reference to learn from."""
    for source in sources:
        wanted = source.keep.model_copy(update={"min_entities": max(1, source.keep.min_entities)})
        if source.keep.looks_at_entities and not len(open_index(source.path, wanted, cache)):
            raise RunError(f"{source.path}: no entity is left after the filter; loosen `keep` of this source")


class TrainingExamples:
    """A transform of the stream: what `SubjectTransform` gives, and

    references (M, 3, S, S) uint8 RGB; noise (2, C, h, w) float32, ~ N(0, 1): of the diffusion, and of the VAE's
    posterior; offset (C, 1, 1) float32, ~ N(0, 1); timestep_draw and condition_draw, float32 ~ U(0, 1).
    """

    def __init__(
        self,
        settings: ExampleSettings,
        max_subjects: int,
        reference_px: int,
        latent: tuple[int, int, int],
        pairs: Pairs | None = None,
    ) -> None:
        """reference_px: side of a reference, CLIP's input; latent: (C, h, w) of the square. Raises RunError."""
        self._pairs = pairs
        self._square = SubjectTransform(
            size_px=settings.size_px, max_subjects=max_subjects, min_visible=settings.min_visible
        )
        self._reference, self._reference_px, self._latent = settings.reference, reference_px, latent
        if settings.reference.background == "photo":
            _photos(settings.reference.photos)

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> Mapping[str, Any]:
        square = self._square(raw, rng)
        image = square["image"].transpose(1, 2, 0)
        references = np.zeros((len(square["present"]), 3, self._reference_px, self._reference_px), np.uint8)
        for k in np.flatnonzero(square["present"]):
            if not square["masks"][k].any():  # labels without masks, or one outside the square: the box stands in
                x1, y1, x2, y2 = square["boxes"][k] * self._square.size_px
                square["masks"][k, int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] = True
            elsewhere = self._elsewhere(raw, int(square["entities"][k]), rng)
            shown, mask = elsewhere or (image, square["masks"][k])
            references[k] = self._reference(shown, mask, self._reference_px, rng)
        timestep, condition = rng.random(2, np.float32)
        return {
            **square,
            "references": references,
            "noise": rng.standard_normal((2, *self._latent), np.float32),
            "offset": rng.standard_normal((self._latent[0], 1, 1), np.float32),
            "timestep_draw": timestep,
            "condition_draw": condition,
        }

    def _elsewhere(
        self, raw: RawSample, number: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
        """Another image of an entity, and its mask there."""
        if not self._pairs or rng.random() >= self._reference.cross_image:
            return None
        found = self._pairs.draw(raw, raw.annotation().entities[number], rng)
        if found is None:
            return None
        image, entity = found
        mask = np.zeros(image.shape[:2], bool)
        if entity.mask is not None:
            mask = coco_mask.decode({"size": entity.mask.size, "counts": entity.mask.counts.encode()}).astype(bool)
        if not mask.any():
            x1, y1, x2, y2 = entity.box
            mask[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] = True
        return image, mask
