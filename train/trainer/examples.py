"""What the subject model learns from: what `SubjectTransform` cuts, a reference of each subject in it, and all random
draws of the training step, so that they are the sample's own wherever it is computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datapipe.decoding import open_image
from model import prepare_reference
from subject_diffusion.errors import RunError
from train.stream.order import crop_draws
from train.stream.shard_index import shows_any
from train.stream.source import Source
from train.stream.tar_sample import RawSample
from train.stream.transform import SubjectBatch, SubjectExample, SubjectTransform
from train.trainer.identities import Pairs
from train.trainer.latents import CachedLatents
from train.trainer.recipe import ExampleSettings, ReferenceSettings

_WHITE = (255, 255, 255)
_PHOTOS = {".jpg", ".jpeg", ".png", ".webp"}


def draw_reference(
    settings: ReferenceSettings,
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    size_px: int,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """image: (H, W, 3) uint8 RGB; mask: (H, W) bool, not empty. Returns (3, size_px, size_px) uint8 RGB."""
    scale, *center = rng.uniform((settings.scale[0], 0, 0), (settings.scale[1], 1, 1))
    photo = None
    if settings.background == "photo":
        photo = open_image(_photos(settings.photos)[int(rng.integers(2**31))].read_bytes()).convert("RGB")
    reference = prepare_reference(
        Image.fromarray(image),
        mask,
        size_px,
        background=settings.background,
        photo=photo,
        scale=scale,
        center=(center[0], center[1]),
    )
    border = cv2.BORDER_CONSTANT if settings.background == "white" else cv2.BORDER_REFLECT
    warped = cv2.warpPerspective(
        np.asarray(reference), _warp(settings, size_px, rng), (size_px,) * 2, borderMode=border, borderValue=_WHITE
    )
    return np.asarray(warped, np.uint8).transpose(2, 0, 1)


def _warp(settings: ReferenceSettings, size_px: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(3, 3), where each pixel of the canvas goes."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32) * size_px
    inwards = np.sign(size_px / 2 - corners) * rng.uniform(0, settings.perspective, (4, 2)) * size_px
    perspective = cv2.getPerspectiveTransform(corners, (corners + inwards).astype(np.float32))
    turn = np.eye(3)
    turn[:2] = cv2.getRotationMatrix2D((size_px / 2,) * 2, rng.uniform(-1, 1) * settings.rotation_degrees, 1.0)
    mirror = np.array([[-1, 0, size_px - 1], [0, 1, 0], [0, 0, 1]]) if rng.random() < settings.flip else np.eye(3)
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


def check_entities(sources: Sequence[Source]) -> None:
    """Raises RunError where no image has a subject: there would be no reference to learn from. One source of several
    may have none, but not because of its filter."""
    found = []
    for source in sources:
        wanted = source.keep.model_copy(update={"min_entities": max(1, source.keep.min_entities)})
        found.append(shows_any(source.path, wanted))
        if source.keep.looks_at_entities and found[-1] is False:
            raise RunError(f"{source.path}: no entity is left after the filter; loosen `keep` of this source")
    if all(shows is False for shows in found):
        paths = ", ".join(source.path for source in sources)
        raise RunError(f"{paths}: no image has a subject; label it with `sdd dataset` and a recipe that finds some")


class TrainingExample(SubjectExample):
    """What `SubjectTransform` gives, a reference of each subject, and all random draws of the training step."""

    references: NDArray[np.uint8]
    """(M, 3, R, R) RGB, zeros where there is no subject."""
    noise: NDArray[np.float32]
    """(2, C, h, w) ~ N(0, 1): that of the diffusion, and that of the VAE's posterior."""
    offset: NDArray[np.float32]
    """(C, 1, 1) ~ N(0, 1)."""
    timestep_draw: np.float32
    """~ U(0, 1)."""
    condition_draw: np.float32
    """~ U(0, 1)."""


class CachedExample(TrainingExample):
    """Likewise, where the latents were computed beforehand."""

    posterior: NDArray[np.float16]
    """(2, C, h, w): the VAE's mean and standard deviation."""


class ExampleBatch(SubjectBatch):
    """B training examples, collated."""

    references: Tensor
    noise: Tensor
    offset: Tensor
    timestep_draw: Tensor
    condition_draw: Tensor
    posterior: NotRequired[Tensor]


class TrainingExamples:
    """A transform of the stream, which makes a training example of a sample."""

    def __init__(
        self,
        settings: ExampleSettings,
        max_subjects: int,
        reference_px: int,
        latent_channels: int,
        latent_factor: int,
        pairs: Pairs | None = None,
    ) -> None:
        """reference_px: side of a reference, CLIP's input; latent_factor: image pixels per latent pixel, along each
        side. Raises RunError."""
        self._pairs = pairs
        self.latents: CachedLatents | None = None
        self._crops = settings.crops
        self._cut = SubjectTransform(
            size_px=settings.size_px, max_subjects=max_subjects, min_visible=settings.min_visible
        )
        self._reference, self._reference_px = settings.reference, reference_px
        self._channels, self._factor = latent_channels, latent_factor
        if settings.reference.background == "photo":
            _photos(settings.reference.photos)

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> TrainingExample | CachedExample:
        crop = 0 if self._crops is None else int(rng.integers(self._crops))
        cut = self._cut(raw, rng if self._crops is None else crop_draws(raw.key, crop))
        image = cut["image"].transpose(1, 2, 0)
        height, width, _ = image.shape
        references = np.zeros((len(cut["present"]), 3, self._reference_px, self._reference_px), np.uint8)
        for k in np.flatnonzero(cut["present"]):
            if not cut["masks"][k].any():  # labels without masks, or one outside the cut: the box stands in
                x1, y1, x2, y2 = cut["boxes"][k] * (width, height, width, height)
                cut["masks"][k, int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] = True
            elsewhere = self._elsewhere(raw, int(cut["entities"][k]), rng)
            shown, mask = elsewhere or (image, cut["masks"][k])
            references[k] = draw_reference(self._reference, shown, mask, self._reference_px, rng)
        timestep, condition = rng.random(2, np.float32)
        latent = (self._channels, height // self._factor, width // self._factor)
        example: TrainingExample = {
            **cut,
            "references": references,
            "noise": rng.standard_normal((2, *latent), np.float32),
            "offset": rng.standard_normal((self._channels, 1, 1), np.float32),
            "timestep_draw": timestep,
            "condition_draw": condition,
        }
        if self.latents is None:
            return example
        return CachedExample(**example, posterior=self.latents.read(raw, crop, (2, *latent)))

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
            mask = entity.mask.array()
        if not mask.any():
            x1, y1, x2, y2 = entity.box
            mask[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] = True
        return image, mask
