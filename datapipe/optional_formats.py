"""HEIC and JPEG XL, whose decoders are extras: found out by the bytes, because only then are they imported."""

from __future__ import annotations

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_JXL_CODESTREAM = b"\xff\x0a"
_JXL_CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
_JXL_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
"""Width to height, by the number that stands for it in JPEG XL's header."""


def optional_format(data: bytes) -> str | None:
    """Pillow's name of the optional format that the bytes are in, once its decoder is there; None for any other format.
    Raises ImportError, which says what to install."""
    if _is_heif(data):
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ImportError("HEIC; pip install '.[heic]' in the project's folder brings its decoder") from None
        register_heif_opener(thumbnails=False)
        return "HEIF"
    if _is_jxl(data):
        try:
            import pillow_jxl  # noqa: F401  (registers itself with Pillow)
        except ImportError:
            raise ImportError("JPEG XL; pip install '.[jxl]' in the project's folder brings its decoder") from None
        return "JXL"
    return None


def too_large_to_open(data: bytes, max_pixels: int) -> bool:
    """Whether merely opening the file would decode more than `max_pixels`: Pillow's plugin for JPEG XL decodes an image
    before it tells its size."""
    if not _is_jxl(data):
        return False
    width, height = _jxl_size(_jxl_codestream(data))
    return width * height > max_pixels


def _is_heif(data: bytes) -> bool:
    if data[4:8] != b"ftyp":
        return False
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    brands = {box[:4], *(box[at : at + 4] for at in range(8, len(box), 4))}
    # AVIF's files name mif1 too, and Pillow reads them by itself.
    return bool(brands & _HEIF_BRANDS) and not brands & {b"avif", b"avis"}


def _is_jxl(data: bytes) -> bool:
    return data.startswith((_JXL_CODESTREAM, _JXL_CONTAINER))


def _jxl_codestream(data: bytes) -> bytes:
    """The first bytes of the codestream; none where the container has none."""
    if data.startswith(_JXL_CODESTREAM):
        return data[:32]
    at = 0
    while at + 8 <= len(data):
        size, kind, begin = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, begin = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        if kind in (b"jxlc", b"jxlp"):
            begin += 4 * (kind == b"jxlp")  # its pieces are numbered
            return data[begin : begin + 32]
        if size < 8:
            break
        at += size
    return b""


def _jxl_size(codestream: bytes) -> tuple[int, int]:
    """Width and height by the size header (ISO/IEC 18181-1, D.2), whose fields are read from the lowest bit on."""
    bits, at = int.from_bytes(codestream[2:], "little"), 0

    def field(count: int) -> int:
        nonlocal at
        at += count
        return bits >> (at - count) & (1 << count) - 1

    is_small = field(1)

    def side() -> int:
        return 8 * (field(5) + 1) if is_small else field((9, 13, 18, 30)[field(2)]) + 1

    height = side()
    ratio = field(3)
    if ratio == 0:
        return side(), height
    across, down = _JXL_RATIOS[ratio]
    return height * across // down, height
