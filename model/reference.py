"""Reference images: a subject is cut out by its mask, resized for CLIP, and encoded, in the same way for training and
sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from model.errors import ModelError
from model.reference_background import ReferenceBackground

Mask = NDArray[np.bool_]


def fill_holes(mask: Mask) -> Mask:
    """mask: (H, W) bool. Holes, which no path of edge neighbors joins to the rim, count as part of the subject
    [released code]."""
    padded = np.pad(mask, 1)
    outside = np.zeros_like(padded)
    outside[0] = True
    reached = 0
    while (count := int(outside.sum())) > reached:
        reached = count
        for lines, walls in ((outside, padded), (outside.T, padded.T)):
            for way in (slice(None), slice(None, None, -1)):
                _flood(lines[:, way], walls[:, way])
    return ~outside[1:-1, 1:-1]


def _flood(outside: Mask, walls: Mask) -> None:
    """Spreads `outside` along each line to its end, or to the next wall; in place."""
    places = np.arange(outside.shape[1])
    seed = np.maximum.accumulate(np.where(outside, places, -1), axis=1)
    wall = np.maximum.accumulate(np.where(walls, places, -1), axis=1)
    outside |= seed > wall


def read_picture(picture: Image.Image | NDArray[Any] | str | Path, what: str) -> Image.Image:
    """An image, the file of one, or an array (H, W, 3 or 4), uint8 or float in 0..1, as an image; a file's is turned
    upright. what: its name in the ModelError."""
    if isinstance(picture, str | Path):
        try:
            picture = ImageOps.exif_transpose(Image.open(picture))
        except OSError as error:
            raise ModelError(f"{what}: {str(error).splitlines()[0]}") from None
    if isinstance(picture, Image.Image):
        return picture
    pixels = np.asarray(picture)
    if pixels.ndim != 3 or pixels.shape[-1] not in (3, 4):
        raise ModelError(f"{what}: an array of shape {pixels.shape}; (height, width, 3 or 4) is needed")
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = (_shares(pixels, what) * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ModelError(f"{what}: an array of {pixels.dtype}; uint8, or float in 0..1, is needed")
    return Image.fromarray(pixels)


def read_mask(mask: Image.Image | NDArray[Any] | str | Path, what: str) -> Mask:
    """An image, the file of one, or an array (H, W), bool, integers up to 1 or 255, or float in 0..1, as (H, W) bool:
    true from half up. what: its name in the ModelError."""
    if isinstance(mask, str | Path):
        mask = read_picture(mask, what)
    values = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[-1]):
        values = values.squeeze(0 if values.shape[0] == 1 else -1)
    if values.ndim != 2:
        raise ModelError(f"{what}: an array of shape {values.shape}; (height, width) is needed")
    if np.issubdtype(values.dtype, np.floating):
        return np.asarray(_shares(values, what) >= 0.5)
    return np.asarray(values >= (128 if values.dtype != np.bool_ and values.max(initial=0) > 1 else 1))


def _shares(values: NDArray[Any], what: str) -> NDArray[Any]:
    if not ((values >= 0) & (values <= 1)).all():
        raise ModelError(f"{what}: an array of {values.dtype} that leaves 0..1")
    return values


def looks_inverted(mask: Mask) -> bool:
    """Whether a mask holds the picture's rim all around, but not what is inside."""
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return bool(rim.mean() > 0.95 and mask.mean() < 0.95)


def _on_white(image: Image.Image) -> Image.Image:
    """RGB. What is hidden under transparency, black as a rule, must show neither inside a mask nor at its edges."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


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
    image = _on_white(image)
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


def encoded_shapes(image_encoder: Any) -> dict[str, tuple[int, ...]]:
    """Of what `encode_references` gives for one reference: `classes` and `patches`."""
    config = image_encoder.config
    return {
        "classes": (config.projection_dim,),
        "patches": ((config.image_size // config.patch_size) ** 2, config.hidden_size),
    }
