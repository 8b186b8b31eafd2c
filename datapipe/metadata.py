"""What stands in an image file beside its pixels. It is read so that nothing broken in it can cost the pixels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

Bytes = bytes | memoryview

_APP0, _APP1, _APP2, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""SOF markers, which begin the frame's header."""
_PROGRESSIVE = 0xC2
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers that nothing follows."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")

_ORIENTATION = 0x0112
_INTEGER_BYTES = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}
"""Bytes of the integer types of EXIF. The standard asks for type 3; some cameras write others."""
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


@dataclass(frozen=True)
class JpegHeader:
    """What stands before a JPEG's pixels. `exif`, `xmp` and `icc` are empty where there is none; `components`: 1 for
    gray, 3 for color, 4 for CMYK, 0 where no frame was found."""

    exif: bytes = b""
    xmp: bytes = b""
    icc: bytes = b""
    components: int = 0
    is_progressive: bool = False


def jpeg_header(data: Bytes) -> JpegHeader:
    """Reads the header of a JPEG; whatever is broken in it is left out."""
    exif = xmp = b""
    profile: list[bytes] = []
    components, progressive = 0, False
    for marker, start, end in _segments(data):
        if marker in _FRAMES:
            components, progressive = data[start + 5] if end > start + 5 else 0, marker == _PROGRESSIVE
        elif marker == _APP1 and not exif and data[start : start + 6] == b"Exif\0\0":
            exif = bytes(data[start:end])
        elif marker == _APP1 and not xmp and data[start : start + 29] == b"http://ns.adobe.com/xap/1.0/\0":
            xmp = bytes(data[start + 29 : end])
        elif marker == _APP2 and data[start : start + 12] == b"ICC_PROFILE\0":
            profile.append(bytes(data[start + 12 : end]))
    # A profile longer than a segment is cut into numbered pieces: the number, how many there are, the piece.
    return JpegHeader(exif, xmp, b"".join(piece[2:] for piece in sorted(profile)), components, progressive)


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation of EXIF, 2 to 8 for a picture that has to be turned; 1 where nothing usable is said. EXIF goes
    before XMP."""
    found = _exif_orientation(exif)
    if found is None and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    # Cameras also write 0 and other values, which turn nothing.
    return found if found is not None and 2 <= found <= 8 else 1


def pixels_alone(data: bytes) -> bytes | None:
    """A JPEG or PNG without all that is not needed to decode it; None for other formats."""
    if data[:2] == b"\xff\xd8":
        return _jpeg_alone(data)
    if data[:8] == _PNG:
        return _PNG + b"".join(_png_chunks(data))
    return None


def _segments(data: Bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, and [start, end) of the content, of each segment of a JPEG up to its first scan."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):  # stray bytes, or fill
            at += 1
            continue
        marker = data[at + 1]
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            return
        if marker in _STANDALONE:
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if not at + 4 <= end <= len(data):
            return
        yield marker, at + 4, end
        at = end


def _jpeg_alone(data: bytes) -> bytes:
    kept, last = [data[:2]], 2
    for marker, start, end in _segments(data):
        # APP14 is Adobe's, and says which color space the numbers are of.
        if not (_APP0 <= marker <= _APP15 or marker == _COMMENT) or marker == _APP14:
            kept.append(data[start - 4 : end])
        last = end
    return b"".join([*kept, data[last:]])


def _png_chunks(data: bytes) -> Iterator[bytes]:
    at = len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in _PNG_PIXELS:
            yield data[at:end]
        at = end


def _exif_orientation(exif: bytes) -> int | None:
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    if exif[:2] not in (b"II", b"MM"):
        return None

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], "little" if exif[:2] == b"II" else "big")

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if entry + 12 > len(exif):
            return None
        if number(entry, 2) == _ORIENTATION:
            size = _INTEGER_BYTES.get(number(entry + 2, 2))
            return None if size is None else number(entry + 8, size)
    return None
