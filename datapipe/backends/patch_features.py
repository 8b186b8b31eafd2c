"""A subject as features of the patches inside its mask: by DINOv2, or the image encoder of SigLIP 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from datapipe.backends.loading import ModelSettings, load, load_model
from datapipe.backends.protocol import Pixels

Mask = NDArray[np.bool_]
Vectors = NDArray[np.float32]

KINDS = ("dinov2", "siglip", "siglip2", "siglip2_vision_model", "siglip_vision_model")
"""`model_type` of models that give a feature for each patch."""


@dataclass(frozen=True)
class SubjectFeatures:
    """embedding: (D,) float32 of length 1, the mean over the mask. patches: (C, D) float32 of length 1, the means over
    the cells of the grid that the mask covers by half, or most; cells: (C,) uint8, which these are, row by row."""

    embedding: Vectors
    patches: Vectors
    cells: NDArray[np.uint8]


def cut_out(pixels: Pixels, mask: Mask, side: int, background: Sequence[float]) -> tuple[Pixels, NDArray[np.float32]]:
    """The subject alone, its longer side filling a square: (side, side, 3) uint8, and how far the mask covers each
    pixel, (side, side) float32. mask: (H, W) bool, not empty. background: RGB in 0..255."""
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    square = max(w, h)
    left, top = (square - w) // 2, (square - h) // 2
    picture = np.empty((square, square, 3), np.float32)
    picture[:] = background
    inside = mask[y : y + h, x : x + w]
    picture[top : top + h, left : left + w][inside] = pixels[y : y + h, x : x + w][inside]
    covered = np.zeros((square, square), np.float32)
    covered[top : top + h, left : left + w] = inside
    way = cv2.INTER_AREA if square > side else cv2.INTER_LINEAR
    resized = (cv2.resize(one, (side, side), interpolation=way) for one in (picture, covered))
    return next(resized).round().astype(np.uint8), next(resized).astype(np.float32)


class PatchFeatures:
    """DINOv2 and SigLIP 2 (of a fixed resolution, or NaFlex)."""

    def __init__(self, settings: ModelSettings, grid: int) -> None:
        """grid: cells a side over which patch features are averaged. Raises BackendError."""
        from transformers import AutoImageProcessor, AutoModel

        self._settings, self._grid = settings, grid
        whole = load_model(settings, AutoModel)
        self._model = getattr(whole, "vision_model", whole)
        self._device, self._dtype = whole.device, whole.dtype
        self._processor = load(settings, AutoImageProcessor.from_pretrained)
        moments = self._processor.image_mean, self._processor.image_std
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in moments)
        self.side = _side(whole.config, self._processor)

    def __call__(self, subjects: Sequence[tuple[Pixels, Mask]]) -> list[SubjectFeatures]:
        """subjects: images of any sizes, (H, W, 3) uint8, each with a mask, (H, W) bool, that is not empty."""
        background = [float(v) * 255 for v in self._mean.flatten()]
        cutouts = [cut_out(pixels, mask, self.side, background) for pixels, mask in subjects]
        found: list[SubjectFeatures] = []
        for start in range(0, len(cutouts), self._settings.images_at_once):
            some = cutouts[start : start + self._settings.images_at_once]
            tokens = self._tokens([pixels for pixels, _ in some])
            covered = torch.from_numpy(np.stack([covered for _, covered in some]))
            found += subject_features(tokens, covered, self._grid)
        return found

    @torch.no_grad()
    def _tokens(self, cutouts: Sequence[Pixels]) -> Tensor:
        """(B, side, side, 3) uint8 -> (B, h, w, D) float32, on the CPU."""
        if hasattr(self._processor, "max_num_patches"):
            inputs = self._processor(images=list(cutouts), return_tensors="pt").to(self._device, self._dtype)
            hidden = self._model(**inputs).last_hidden_state
            height, width = inputs["spatial_shapes"][0].tolist()
            hidden = hidden[:, : height * width]
        else:
            pixels = torch.from_numpy(np.stack(cutouts)).permute(0, 3, 1, 2).float() / 255
            normal = ((pixels - self._mean) / self._std).to(self._device, self._dtype)
            hidden = self._model(pixel_values=normal).last_hidden_state
            height = width = self.side // self._model.config.patch_size
            hidden = hidden[:, -height * width :]  # the class token, where there is one, comes first
        tokens: Tensor = hidden.float().cpu().unflatten(1, (height, width))
        return tokens


def subject_features(tokens: Tensor, covered: Tensor, grid: int) -> list[SubjectFeatures]:
    """Means of patch features, weighted by the mask.

    tokens: (B, h, w, D) float32; covered: (B, S, S) float32 in 0..1, how far the mask covers each pixel.
    """
    cells, cover, embedding = pooled(tokens, covered, grid)
    kept = cover >= cover.amax(dim=1, keepdim=True).clamp(max=0.5)
    return [
        SubjectFeatures(e.numpy(), c[k].numpy(), np.flatnonzero(k.numpy()).astype(np.uint8))
        for e, c, k in zip(embedding, cells, kept, strict=True)
    ]


def pooled(tokens: Tensor, covered: Tensor, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `subject_features`, as tensors: cells (B, grid², D) of length 1, how far the mask covers each (B, grid²), and
    the embedding (B, D) of length 1."""
    height, width = tokens.shape[1:3]
    weight = functional.adaptive_avg_pool2d(covered[:, None], (height, width))
    features = tokens.permute(0, 3, 1, 2) * weight
    cover = functional.adaptive_avg_pool2d(weight, grid).flatten(1)
    cells = functional.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2)
    return functional.normalize(cells, dim=-1), cover, functional.normalize(features.sum(dim=(2, 3)), dim=-1)


def _side(config: Any, processor: Any) -> int:
    """Pixels of the square that the model sees."""
    patches = getattr(processor, "max_num_patches", None)
    if patches:
        return int(patches**0.5) * int(processor.patch_size)
    vision = getattr(config, "vision_config", config)
    side = int(vision.image_size)
    # DINOv2 was trained at 518 px last, and is compared at 224 by everybody.
    return min(side, 224 // vision.patch_size * vision.patch_size) if config.model_type == "dinov2" else side
