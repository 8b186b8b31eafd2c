"""Image bytes from the web, which are hostile, become images that every later step can trust."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from datapipe.schema import Reason

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Decoders that are let near the bytes; Pillow's others include some that run programs (EPS)."""

JPEG_QUALITY = 95
_MAX_JPEG_SIDE_PX = 65_500
"""libjpeg writes no more."""
_EXIF_ORIENTATION = 0x0112
_TURNED = range(2, 9)
"""Cameras also write 0 and other values, which turn nothing."""


class ImageRefusedError(Exception):
    """The bytes give no usable image; `reason` says why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class NormalImage:
    """`data`: an upright RGB or grey JPEG; `pixels`: (H, W, 3) uint8 RGB of it; original sizes: upright, in pixels."""

    data: bytes
    pixels: NDArray[np.uint8]
    original_width: int
    original_height: int


def decode_rgb(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a stored image. Stored images are upright JPEGs, so orientation is not looked for."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ValueError("the stored image cannot be decoded")
    rgb: NDArray[np.uint8] = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return rgb


def normalise(data: bytes, max_pixels: int, max_side_px: int | None = None) -> NormalImage:
    """Decodes fetched bytes; keeps them as they are if they can be stored so, else encodes them anew.

    Anything that is no upright 8-bit RGB or grey JPEG is converted: the first frame, alpha over white, EXIF orientation
    applied, CMYK and 16 bits reduced. Raises ImageRefusedError before memory is spent on more than `max_pixels`.
    """
    if not data:
        raise ImageRefusedError(Reason.UNDECODABLE, "no bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns below `max_pixels`; beyond twice that it raises. The limit that counts is the caller's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageRefusedError(Reason.UNSUPPORTED_FORMAT, f"starts with {data[:12]!r}") from None
    except Image.DecompressionBombError:
        raise ImageRefusedError(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels") from None
    except (
        Exception
    ) as error:  # Pillow's parsers raise whatever broken headers provoke: struct.error, OverflowError, ...
        raise ImageRefusedError(Reason.UNDECODABLE, _one_line(error)) from None
    if image.width * image.height > max_pixels:
        raise ImageRefusedError(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height} > {max_pixels} pixels")
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        storable = image.format == "JPEG" and image.mode in ("RGB", "L") and orientation not in _TURNED
        upright = _upright_rgb(image)
        original_width, original_height = upright.size
        if max_side_px is not None and max(upright.size) > max_side_px:
            upright.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
            storable = False
        if not storable:
            data = _jpeg(upright)
    except ImageRefusedError:
        raise
    except Exception as error:  # as above
        raise ImageRefusedError(Reason.UNDECODABLE, _one_line(error)) from None
    return NormalImage(data, np.asarray(upright), original_width, original_height)


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow clips 16 bits to 8 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float32))
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values * (255 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _jpeg(image: Image.Image) -> bytes:
    if max(image.size) > _MAX_JPEG_SIDE_PX:
        raise ImageRefusedError(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height}: a side > {_MAX_JPEG_SIDE_PX}")
    image.info.clear()  # Else Pillow copies the comment, and refuses a long one.
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=JPEG_QUALITY)
    return sink.getvalue()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
