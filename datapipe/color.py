"""Color profiles: pixels of Display P3, Adobe RGB, ProPhoto and others become sRGB, which models were trained on."""

from __future__ import annotations

import functools
import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
"""Pillow's mode by the color space that an ICC profile says it is for."""
_COLOR_SPACE = slice(16, 20)
_SAME_LEVELS = 3
"""Levels of 255. The many profiles that are called sRGB differ by at most so much from each other."""


def _adobe_rgb() -> bytes:
    """A profile of ICC's version 2.1, with the primaries (XYZ under D50) and the exponent of Adobe's own."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    gamma = b"curv" + struct.pack(">4xIH2x", 1, 563)  # 2 51/256
    tags = {
        b"rXYZ": b"XYZ " + bytes(4) + fixed(0.60974, 0.31111, 0.01947),
        b"gXYZ": b"XYZ " + bytes(4) + fixed(0.20528, 0.62567, 0.06087),
        b"bXYZ": b"XYZ " + bytes(4) + fixed(0.14919, 0.06322, 0.74457),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma),
    }
    at = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4s2I", name, at + len(body), len(content))
        body += content
    header = struct.pack(">4xI4s4s4s12x4s28x", 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    header += fixed(0.9642, 1.0, 0.8249) + bytes(48)
    return struct.pack(">I", at + len(body)) + header + table + body


ADOBE_RGB = _adobe_rgb()


def to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """An image of mode RGB, L or CMYK as sRGB: RGB where its profile changed it, else the image itself. A profile that
    is broken, for another color space, or sRGB in all but name changes nothing."""
    transform = _transform(icc) if icc else None
    if transform is None or _MODES[icc[_COLOR_SPACE]] != image.mode:
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only in place there is nothing to return
    return converted


def pixels_to_srgb(pixels: NDArray[np.uint8], icc: bytes, is_gray: bool) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB as a decoder gave it -> the same as sRGB. `icc`: the file's profile; `is_gray`: the file has
    one channel, of which these are three copies."""
    if not icc or _transform(icc) is None:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if is_gray else pixels)
    converted = to_srgb(image, icc)
    return pixels if converted is image else np.asarray(converted)


@functools.lru_cache(maxsize=64)
def _transform(icc: bytes) -> ImageCms.ImageCmsTransform | None:
    """To sRGB; None where it would change nothing or cannot be made. Building one takes milliseconds, and most images
    of a source have one of a few profiles."""
    mode = _MODES.get(icc[_COLOR_SPACE])
    if mode is None:
        return None
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(icc)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "RGB" and _changes_nothing(transform):
            return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # whatever a broken profile provokes
        return None
    return transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    converted = ImageCms.applyTransform(Image.fromarray(colors), transform)
    return bool(np.abs(np.asarray(converted, np.int16) - colors).max() <= _SAME_LEVELS)
