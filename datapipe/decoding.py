"""Image bytes from the web, which are hostile, become images that every later step can trust.

There is one decoder for all of them: what the pipeline screens and labels, and what the stream reads from tars of
others, is upright, 8-bit, sRGB, and over white where it was transparent.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from datapipe.color import pixels_to_srgb
from datapipe.image_file import MAX_SCANS, ImageRefusedError, decode_file, turned
from datapipe.metadata import (
    Bytes,
    jpeg_header,
    scans_of,
    without_metadata,
)
from datapipe.schema import MAX_PIXELS, Reason

JPEG_QUALITY = 95
_STRIP = 256
"""Rows that are converted at once, where another copy of all of them would be a burden."""
_MAX_JPEG_SIDE_PX = 65_500
"""libjpeg writes no more."""


@dataclass(frozen=True)
class NormalImage:
    """`data`: an upright RGB or gray JPEG of `width` x `height` pixels; `pixels`: (H, W, 3) uint8 sRGB of it, perhaps a
    half, a quarter or an eighth as wide and high (see `SEEN_PX`); original sizes: upright, in pixels."""

    data: bytes
    pixels: NDArray[np.uint8]
    width: int
    height: int
    original_width: int
    original_height: int


def scaled_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """The (height, width) of a resized image by the rule of Grounding DINO's code: the shorter side as asked, unless
    that makes the longer one too long. The longer side is cut to whole pixels, not rounded. All in pixels."""
    shorter, longer = min(height, width), max(height, width)
    if longer / shorter * short_side > long_side:
        short_side = round(long_side * shorter / longer)
    resized = max(1, short_side), max(1, int(short_side * longer / shorter))
    return resized if height <= width else resized[::-1]


def decode_rgb(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 sRGB of a stored image. Stored images are upright JPEGs, so orientation is not looked for."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ValueError("the stored image cannot be decoded")
    header = jpeg_header(data)
    rgb = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
    return pixels_to_srgb(rgb, header.icc, header.components == 1)


def decode_image(data: Bytes, least_side_px: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 sRGB, upright, of any image file. A JPEG much larger than `least_side_px` is decoded at a half, a
    quarter or an eighth of its size, which costs that much less. Raises ImageRefusedError."""
    if simplejpeg.is_jpeg(data):
        header = jpeg_header(data)
        # It also refuses files whose faults other decoders pass over (stray bytes between markers): Pillow decides. Of
        # CMYK it knows no profile.
        if header.components < 4 and header.pixels <= MAX_PIXELS and scans_of(data) <= MAX_SCANS:
            with contextlib.suppress(ValueError):
                rgb: NDArray[np.uint8] = simplejpeg.decode_jpeg(
                    data, "RGB", min_height=least_side_px, min_width=least_side_px
                )
                return turned(pixels_to_srgb(rgb, header.icc, header.components == 1), header)
    return np.asarray(_over_white(open_image(bytes(data))))


def open_image(data: bytes) -> Image.Image:
    """Any image file as an upright sRGB image: RGB, or RGBA where some of it is transparent. Raises
    ImageRefusedError."""
    return decode_file(data, MAX_PIXELS, 0.0, MAX_SCANS).upright


def normalize(
    data: bytes,
    max_pixels: int,
    max_side_px: int | None = None,
    short_side_px: int | None = None,
    max_missing: float = 0.0,
    max_scans: int = MAX_SCANS,
    *,
    strip: bool = False,
) -> NormalImage:
    """Decodes fetched bytes; keeps them as they are if they can be stored so, else encodes them anew.

    Anything that is no upright 8-bit RGB or gray JPEG is converted: the first frame, alpha over white, EXIF orientation
    applied, CMYK and 16 bits reduced, colors to sRGB. A JPEG that is kept keeps its color profile. Of a truncated image
    the rows that are there are taken if at most the share `max_missing` is not. With `short_side_px` the image is
    brought to that shorter side, shrunk or enlarged, unless the longer one then exceeds `max_side_px`; without it, only
    images above `max_side_px` shrink. `strip`: metadata is taken out of what is kept, too. Raises ImageRefusedError
    before memory is spent on more than `max_pixels`, of which those of more than three bytes count for more, or time on
    more than `max_scans` of a JPEG.
    """

    def is_resized(size: tuple[int, int]) -> bool:
        if short_side_px is not None:
            return scaled_size(*size, short_side_px, max_side_px or _MAX_JPEG_SIDE_PX) != size
        return max_side_px is not None and max(size) > max_side_px

    decoded = decode_file(data, max_pixels, max_missing, max_scans, may_shrink=lambda size: not is_resized(size))
    upright, stored = _over_white(decoded.upright), decoded.data
    size = original = decoded.size
    if is_resized(original):
        upright, stored = _resized(upright, max_side_px, short_side_px), None
        size = upright.size
    if stored is None:
        stored = _jpeg(upright)
    elif strip:
        stored = without_metadata(stored)
    return NormalImage(stored, _pixels(upright), *size, *original)


def _resized(image: Image.Image, max_side_px: int | None, short_side_px: int | None) -> Image.Image:
    if short_side_px is not None:
        size = scaled_size(*image.size, short_side_px, max_side_px or _MAX_JPEG_SIDE_PX)
        return image.resize(size, Image.Resampling.BILINEAR)
    assert max_side_px is not None
    image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    return image


def strips(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """(H, W, 3) in parts of a few rows."""
    return (pixels[top : top + _STRIP] for top in range(0, len(pixels), _STRIP))


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) of an RGB image; Pillow by itself would hold them twice meanwhile."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _STRIP):
        pixels[top : top + _STRIP] = np.asarray(image.crop((0, top, image.width, min(top + _STRIP, image.height))))
    return pixels


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    opaque = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        opaque.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return opaque


def _jpeg(image: Image.Image) -> bytes:
    if max(image.size) > _MAX_JPEG_SIDE_PX:
        raise ImageRefusedError(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height}: a side > {_MAX_JPEG_SIDE_PX}")
    image.info.clear()  # Else Pillow copies the comment, and refuses a long one.
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=JPEG_QUALITY)
    return sink.getvalue()
