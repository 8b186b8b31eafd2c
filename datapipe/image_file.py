"""An image file, which is hostile, becomes an upright image in 8-bit sRGB, or is refused with a reason."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from datapipe.color import to_srgb
from datapipe.metadata import (
    JpegHeader,
    jpeg_header,
    orientation,
    pixels_alone,
    profile_of_exif,
    scans_of,
)
from datapipe.optional_formats import optional_format, too_large_to_open
from datapipe.schema import MAX_PIXELS, Reason
from subject_diffusion.errors import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Decoders that are let near the bytes; Pillow's others include some that run programs (EPS). HEIC and JPEG XL come
with extras: see `optional_formats`."""

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif",
    ".jxl",
)  # fmt: skip
"""Endings of image files, in lower case."""

MAX_SCANS = 100
"""The most scans of a JPEG where no recipe sets it. Progressive ones have about 10, and up to 60 where an optimizer was
thorough."""
SEEN_PX = 1024
"""A JPEG that is kept as it is may be decoded smaller, as long as both sides have so many pixels: what is still wanted
of them is statistics. Of a photograph of 12 megapixels that is a quarter of the pixels; web images of 1,500 pixels are
decoded whole."""
_MOST_JUNK = 64
"""Bytes before an image's start that are passed over. Further on, an image may be the thumbnail of something else."""
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_SIGNATURES = (*_STARTS, b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"\xff\x0a", b"\0\0\0\x0cJXL ")
_END_OF_JPEG = b"\xff\xd9"
_PAD = b"\xaa" * 4096
"""Stands for the pixels that a truncated JPEG lacks: a decoder that still wants some shows it."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""


class ImageRefusedError(Exception):
    """The bytes give no usable image; `reason` says why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def upright_size(path: Path) -> tuple[int, int] | None:
    """Width and height in pixels of an image file once it is upright; None where no image is there."""
    try:
        data = path.read_bytes()
        image = _opened(data, MAX_PIXELS)
    except (OSError, ImageRefusedError):
        return None
    header = jpeg_header(data) if image.format in ("JPEG", "MPO") else _header(image)
    width, height = image.size
    return (height, width) if orientation(header.exif, header.xmp) >= 5 else (width, height)


def is_image_start(start: bytes) -> bool:
    """Whether a file that begins with these bytes (32 will do) is an image of a format that is read here."""
    is_heif_or_avif = start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return start.startswith(_SIGNATURES) or is_webp or is_heif_or_avif


def orientation_of(image: Image.Image) -> int:
    """An opened image's EXIF orientation, 1 to 8."""
    header = _header(image)
    return orientation(header.exif, header.xmp)


@dataclass(frozen=True)
class Decoded:
    """`upright`: RGB or RGBA; `data`: a JPEG of just these pixels, or None where one has to be made; `size`: width and
    height in pixels, which only an image with `data` may lack."""

    upright: Image.Image
    data: bytes | None
    size: tuple[int, int]


def _never(size: tuple[int, int]) -> bool:
    return False


def decode_file(
    data: bytes,
    max_pixels: int,
    max_missing: float,
    max_scans: int,
    may_shrink: Callable[[tuple[int, int]], bool] = _never,
) -> Decoded:
    """Decodes an image file; metadata that is broken, or a few bytes before its start, cost it nothing. `may_shrink`:
    whether a JPEG of this width and height that is kept as it is may be decoded smaller."""
    if not data:
        raise ImageRefusedError(Reason.UNDECODABLE, "no bytes")
    starts = [at for start in _STARTS if (at := data.find(start, 0, _MOST_JUNK + len(start))) >= 0]
    whole = data[min(starts) :] if starts else data
    if (scans := scans_of(whole)) > max_scans:
        raise ImageRefusedError(Reason.TOO_MANY_SCANS, f"{scans} scans > {max_scans}")
    try:
        return _decode_as_it_is(whole, whole, max_pixels, max_missing, may_shrink)
    except ImageRefusedError as refused:
        alone = pixels_alone(whole)
        if alone is None or alone == whole or refused.reason is Reason.TOO_MANY_PIXELS:
            raise
        try:
            return _decode_as_it_is(alone, whole, max_pixels, max_missing, may_shrink)
        except ImageRefusedError:
            raise refused from None


def _decode_as_it_is(
    data: bytes, whole: bytes, max_pixels: int, max_missing: float, may_shrink: Callable[[tuple[int, int]], bool]
) -> Decoded:
    """`whole`: the file that `data` is, or of which it is the pixels alone: there a JPEG's header is looked for."""
    image = _opened(data, max_pixels)
    header = jpeg_header(whole) if image.format in ("JPEG", "MPO") else _header(image)
    is_kept = (
        image.format == "JPEG"
        and image.mode in ("RGB", "L")
        and (data is whole or not header.icc)
        and orientation(header.exif, header.xmp) == 1
    )
    size = image.size
    try:
        try:
            if is_kept and may_shrink(size):
                _shrink(image)
            image.load()
            lost_rows = 0
        except OSError as error:
            image, lost_rows = _truncated(data, max_pixels, max_missing, error)
            size = image.size
            if image.format == "JPEG" and not lost_rows:
                data = data.rstrip(b"\xff") + _END_OF_JPEG
        upright = _upright(image, header)
        if is_kept and not lost_rows:
            return Decoded(upright, data, size)
        return Decoded(upright, None, upright.size)
    except ImageRefusedError:
        raise
    except Exception as error:  # Pillow's parsers raise whatever broken files provoke: struct.error, OverflowError, ...
        raise ImageRefusedError(Reason.UNDECODABLE, f"{type(error).__name__}: {one_line(error)}"[:200]) from None


def _shrink(image: Image.Image) -> None:
    """Lets libjpeg decode a half, a quarter or an eighth of each side, as long as `SEEN_PX` are left of it."""
    scale = next((scale for scale in (8, 4, 2) if min(image.size) >= scale * SEEN_PX), 1)
    image.draft(None, (image.width // scale, image.height // scale))


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """The image, whose pixels are not yet decoded."""
    try:
        optional = optional_format(data)
    except ImportError as error:
        raise ImageRefusedError(Reason.UNSUPPORTED_FORMAT, str(error)) from None
    if too_large_to_open(data, max_pixels):
        raise ImageRefusedError(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels")
    try:
        with warnings.catch_warnings():
            # Pillow warns of broken metadata, and of many pixels; beyond twice as many it raises. The limit that counts
            # is the caller's.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=(optional,) if optional else FORMATS)
    except UnidentifiedImageError:
        raise ImageRefusedError(Reason.UNSUPPORTED_FORMAT, f"starts with {data[:12]!r}") from None
    except Image.DecompressionBombError:
        raise ImageRefusedError(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels") from None
    except Exception as error:  # as in `_decode_as_it_is`
        raise ImageRefusedError(Reason.UNDECODABLE, f"{type(error).__name__}: {one_line(error)}"[:200]) from None
    bytes_each = _bytes_per_pixel(image)
    if image.width * image.height * max(bytes_each, 3) > max_pixels * 3:
        each = f" of {bytes_each} bytes" if bytes_each > 3 else ""
        raise ImageRefusedError(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height}{each} > {max_pixels} pixels")
    return image


def _bytes_per_pixel(image: Image.Image) -> int:
    """Bytes of a decoded pixel, as the file has it."""
    tiles = getattr(image, "tile", None)
    is_wide = image.mode.startswith("I;16") or bool(tiles and "16" in str(tiles[0][3]))
    return len(image.getbands()) * (4 if image.mode in ("I", "F") else 2 if is_wide else 1)


def _header(image: Image.Image) -> JpegHeader:
    """What Pillow found beside the pixels of a file that is no JPEG."""
    info = image.info
    exif, xmp = info.get("exif"), info.get("xmp") or info.get("XML:com.adobe.xmp")
    if exif is None and (written := info.get("Raw profile type exif")):  # ImageMagick's way in PNG: in hexadecimal
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(written.split("\n")[3:]))
    icc = info.get("icc_profile") or profile_of_exif(exif or b"")
    if image.format in ("TIFF", "HEIF") or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        exif = xmp = None  # their decoders turn the pixels themselves
    return JpegHeader(exif or b"", xmp.encode() if isinstance(xmp, str) else xmp or b"", icc)


def _truncated(data: bytes, max_pixels: int, max_missing: float, error: OSError) -> tuple[Image.Image, int]:
    """The rows that are there of an image that ends early, and how many are not. Raises ImageRefusedError for more than
    the share `max_missing`.

    An image that lacks nothing comes out the same whatever follows on its bytes; of another one, what follows shows in
    every row from the first one that lacks something.
    """
    if data[:2] == b"\xff\xd8":
        data = data.rstrip(b"\xff")  # half of the end mark, or of another one
        ends = (data + _END_OF_JPEG, data + _PAD + _END_OF_JPEG)
        one, other = (_with_what_loads(end, max_pixels, 0) for end in ends)
    else:
        one, other = (_with_what_loads(data, max_pixels, fill) for fill in (0, 1))
    differ = np.asarray(one) != np.asarray(other)
    rows = np.flatnonzero(differ.reshape(len(differ), -1).any(axis=1))
    # A progressive JPEG lacks some of every row.
    first_lost = 0 if len(rows) and one.info.get("progressive") else int(rows[0]) if len(rows) else one.height
    lost = one.height - first_lost
    if lost > max_missing * one.height:
        share = f"the last {lost / one.height:.0%}" if first_lost else "all"
        raise ImageRefusedError(Reason.UNDECODABLE, f"truncated: {share} of its rows are not whole") from error
    if not lost:
        return one, 0
    rest = one.crop((0, 0, one.width, first_lost))
    rest.format = one.format
    return rest, lost


def _with_what_loads(data: bytes, max_pixels: int, fill: int) -> Image.Image:
    """The image, with `fill` where no pixel was decoded."""
    image = _opened(data, max_pixels)
    with contextlib.suppress(OSError):
        # Pillow decodes into the memory that the image has. Without this it would be zeros.
        bands = len(image.getbands())
        image.im = Image.new(image.mode, image.size, fill if bands == 1 else (fill,) * bands).im
        image.load()
    loaded = image._new(image.im)  # another load would raise again
    loaded.format = image.format
    return loaded


def turned(pixels: NDArray[np.uint8], header: JpegHeader) -> NDArray[np.uint8]:
    turn = _TURNS.get(orientation(header.exif, header.xmp))
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _upright(image: Image.Image, header: JpegHeader) -> Image.Image:
    """RGB, or RGBA where some of it is transparent."""
    turn = _TURNS.get(orientation(header.exif, header.xmp))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):
        # Pillow clips 16 bits to 8 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float32))
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(values * (255 / top), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = _in_mode(image, "RGBA")
        if not header.icc:
            return rgba
        opaque = image.convert("L") if image.mode == "LA" else rgba.convert("RGB")
        converted = _in_mode(to_srgb(opaque, header.icc), "RGB")
        converted.putalpha(rgba.getchannel("A"))
        return converted
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return _in_mode(to_srgb(image, header.icc), "RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image itself where it is: Pillow would copy it."""
    return image if image.mode == mode else image.convert(mode)
