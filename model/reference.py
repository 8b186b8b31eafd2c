"""Reference images: a subject is cut out by its mask, resized for CLIP, and encoded, in the same way for training and
sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from model.errors import ModelError
from model.settings import ReferenceBackground

Mask = NDArray[np.bool_]


def fill_holes(mask: Mask) -> Mask:
    """mask: (H, W) bool. Holes count as part of the subject [released code]."""
    filled: Mask = ndimage.binary_fill_holes(mask)
    return filled


def extent(mask: Mask) -> tuple[int, int, int, int]:
    """The mask's box, xyxy in its pixels, the ends exclusive. Raises ModelError when the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise ModelError("the mask of a reference is empty: it must be true somewhere")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def prepare_reference(
    image: Image.Image,
    mask: Mask | None,
    size: int,
    *,
    background: ReferenceBackground = "white",
    photo: Image.Image | None = None,
    scale: float = 1.0,
    center: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """The subject on a square canvas.

    image: the picture that shows it; mask: (H, W) bool of the same size, its holes are filled; None takes the whole
    picture for the subject. size: of the result, pixels, CLIP's input. background: what is behind the subject; `photo`,
    to be given for that background, is stretched over the canvas. scale: the subject's longer side as a share of the
    canvas; center: of the subject, x and y as shares of the canvas, moved inward where the subject would stick out.
    Returns an RGB image. Raises ModelError.
    """
    image = image.convert("RGB")
    if mask is None:
        mask = np.ones((image.height, image.width), dtype=np.bool_)
    if mask.shape != (image.height, image.width):
        raise ModelError(
            f"a reference of {image.width}x{image.height} pixels came with a mask of "
            f"{'x'.join(str(side) for side in reversed(mask.shape))}: they must be the same size"
        )
    mask = fill_holes(mask)
    box = extent(mask)
    subject, alpha = image.crop(box), Image.fromarray(mask).convert("L").crop(box)
    shrink = scale * size / max(subject.size)
    width, height = (max(1, min(size, round(side * shrink))) for side in subject.size)
    subject = subject.resize((width, height), Image.Resampling.BICUBIC)
    alpha = alpha.resize((width, height), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (size, size), "white")
    if background == "photo":
        assert photo is not None
        canvas = photo.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    left = min(max(round(center[0] * size - width / 2), 0), size - width)
    top = min(max(round(center[1] * size - height / 2), 0), size - height)
    canvas.paste(subject, (left, top), None if background == "original" else alpha)
    return canvas


def reference_tensor(reference: Image.Image) -> Tensor:
    """An RGB image as (3, S, S) uint8."""
    return torch.from_numpy(np.array(reference.convert("RGB"))).permute(2, 0, 1).contiguous()


def encode_references(
    image_encoder: Any, references: Tensor, present: Tensor, mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """CLIP's encoding of each reference that is present. The slots of the others hold no meaningful values.

    references: (B, K, 3, S, S) uint8; present: (B, K) bool; mean, std: (3,), of CLIP's image processor. Returns the
    projected class embeddings (B, K, D), and the patch tokens before the last norm (B, K, P, W).
    """
    seen = present if present.any() else torch.ones_like(present)  # CLIP takes no empty batch
    pixels = (references[seen] / 255 - mean[:, None, None]) / std[:, None, None]
    encoded = image_encoder(pixels.to(image_encoder.dtype))

    def by_slot(found: Tensor) -> Tensor:
        return found.new_zeros(*seen.shape, *found.shape[1:]).index_put((seen,), found)

    return by_slot(encoded.image_embeds), by_slot(encoded.last_hidden_state[:, 1:])
