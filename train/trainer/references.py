"""References in training: each shows its subject alone, moved about so that a plain copy is not rewarded."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datapipe.decoding import open_image
from datapipe.schema import Entity
from model import prepare_reference
from subject_diffusion.errors import RunError
from train.trainer.recipe import ReferenceSettings

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
        photo = open_image(photos(settings.photos)[int(rng.integers(2**31))].read_bytes()).convert("RGB")
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


def stored_mask(image: NDArray[np.uint8], entity: Entity) -> NDArray[np.bool_]:
    """(H, W), of an entity in its stored image; its box where it has none."""
    mask = np.zeros(image.shape[:2], bool)
    if entity.mask is not None:
        mask = entity.mask.array()
    if not mask.any():
        x1, y1, x2, y2 = entity.box
        mask[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] = True
    return mask


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
        self._folder = Path(folder)
        self._paths = sorted(p for p in self._folder.rglob("*") if p.suffix.lower() in _PHOTOS)
        if not self._paths:
            raise RunError(f"examples.reference.photos: no pictures in {folder}")

    def __getitem__(self, number: int) -> Path:
        return self._paths[number % len(self._paths)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of names and sizes: the same wherever the folder lies."""
        known_by = [(str(path.relative_to(self._folder)), path.stat().st_size) for path in self._paths]
        return hashlib.sha256(json.dumps(known_by).encode()).hexdigest()


@functools.cache
def photos(folder: str | None) -> _Photos:
    """Those of `examples.reference.photos`. Raises RunError."""
    if folder is None:
        raise RunError("examples.reference.background: photo needs a folder of pictures in examples.reference.photos")
    return _Photos(folder)
