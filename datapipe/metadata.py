"""What stands in an image file beside its pixels. It is read so that nothing broken in it can cost the pixels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from datapipe.color import ADOBE_RGB

Bytes = bytes | memoryview

_APP0, _APP1, _APP2, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""SOF markers, which begin the frame's header."""
_PROGRESSIVE = 0xC2
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers that nothing follows."""

_SCAN = re.compile(rb"\xff\xda")
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""What is no data within scans."""

_MOST_OF_PROFILE = 65_519
"""Bytes of a color profile that a segment holds."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")

_ORIENTATION, _EXIF, _COLOR_SPACE, _INTEROPERABILITY, _INDEX = 0x0112, 0x8769, 0xA001, 0xA005, 0x0001
"""Tags. Those of EXIF and of interoperability lead to directories of their own."""
_SRGB, _ADOBE = 1, 2
"""Values of the color space. The second is none of the standard's, but some cameras write it."""
_INTEGER_BYTES = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}
"""Bytes of the integer types of EXIF. The standard asks for type 3; some cameras write others."""
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


@dataclass(frozen=True)
class JpegHeader:
    """What stands before a JPEG's pixels. `exif`, `xmp` and `icc` are empty where there is none, but for an `icc` of
    Adobe RGB where EXIF alone says so; `components`: 1 for gray, 3 for color, 4 for CMYK, and `pixels`: width × height;
    both are 0 where no frame was found.
    """

    exif: bytes = b""
    xmp: bytes = b""
    icc: bytes = b""
    components: int = 0
    is_progressive: bool = False
    pixels: int = 0


def jpeg_header(data: Bytes) -> JpegHeader:
    """Reads the header of a JPEG; whatever is broken in it is left out."""
    exif = xmp = b""
    profile: list[bytes] = []
    components, progressive, pixels = 0, False, 0
    for marker, start, end in _segments(data):
        if marker in _FRAMES:
            components, progressive = data[start + 5] if end > start + 5 else 0, marker == _PROGRESSIVE
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start + 1, start + 3))
            pixels = height * width
        elif marker == _APP1 and not exif and data[start : start + 6] == b"Exif\0\0":
            exif = bytes(data[start:end])
        elif marker == _APP1 and not xmp and data[start : start + 29] == b"http://ns.adobe.com/xap/1.0/\0":
            xmp = bytes(data[start + 29 : end])
        elif marker == _APP2 and data[start : start + 12] == b"ICC_PROFILE\0":
            profile.append(bytes(data[start + 12 : end]))
    # A profile longer than a segment is cut into numbered pieces: the number, how many there are, the piece.
    icc = b"".join(piece[2:] for piece in sorted(profile))
    return JpegHeader(exif, xmp, icc or profile_of_exif(exif), components, progressive, pixels)


def scans_of(data: Bytes) -> int:
    """How many scans a JPEG has, each of which costs a pass over all of its pixels; 0 for another file."""
    if data[:2] != b"\xff\xd8":
        return 0
    last = 2
    for _, _, end in _segments(data):  # a thumbnail in a segment has scans of its own
        last = end
    # Within a scan, 0xFF is followed by 0.
    return sum(1 for _ in _SCAN.finditer(data, last))


def profile_of_exif(exif: bytes) -> bytes:
    """The ICC profile of Adobe RGB for a camera's file that says so in EXIF alone, as the standard DCF 2.0 has it; else
    none, which means sRGB."""
    directories = _Exif(exif)
    space = directories.integer(_EXIF, _COLOR_SPACE)
    is_adobe = space == _ADOBE or (
        space != _SRGB and directories.text(_EXIF, _INTEROPERABILITY, _INDEX).startswith(b"R03")
    )
    return ADOBE_RGB if is_adobe else b""


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation of EXIF, 2 to 8 for a picture that has to be turned; 1 where nothing usable is said. EXIF goes
    before XMP."""
    found = _Exif(exif).integer(_ORIENTATION)
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


def without_metadata(data: bytes) -> bytes:
    """A JPEG with the same pixels and color profile, and nothing else: no EXIF, XMP, IPTC, comment or thumbnail, and
    nothing behind its end, where cameras put further pictures."""
    header = jpeg_header(data)
    pieces = [header.icc[at : at + _MOST_OF_PROFILE] for at in range(0, len(header.icc), _MOST_OF_PROFILE)]
    profile = [
        b"\xff\xe2" + (16 + len(piece)).to_bytes(2, "big") + b"ICC_PROFILE\0" + bytes((number, len(pieces))) + piece
        for number, piece in enumerate(pieces, 1)
    ]
    alone = _jpeg_alone(data)
    first_scan = max((end for _, _, end in _segments(alone)), default=2)
    return b"".join([alone[:2], *profile, alone[2:first_scan], *_scans_alone(alone, first_scan)])


def _scans_alone(data: bytes, at: int) -> Iterator[bytes]:
    """The scans of a JPEG, the first of which begins there, with the tables between them and the end mark."""
    while (found := _MARKER.search(data, at)) is not None:
        marker = data[found.start() + 1]
        yield data[at : found.start()]
        if marker == _END_OF_IMAGE:
            yield data[found.start() : found.end()]
            return
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        if not (_APP0 <= marker <= _APP15 or marker == _COMMENT):
            yield data[found.start() : at]
    yield data[at:]


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


class _Exif:
    """EXIF's directories, whose entries are looked for by the tags that lead to them: `(_EXIF, _COLOR_SPACE)` is an
    entry of the directory that an entry of the first one leads to."""

    def __init__(self, exif: bytes) -> None:
        while exif.startswith(b"Exif\0\0"):
            exif = exif[6:]
        self._data = exif if exif[:2] in (b"II", b"MM") else b""

    def integer(self, *path: int) -> int | None:
        entry = self._entry(path)
        size = None if entry is None else _INTEGER_BYTES.get(self._number(entry + 2, 2))
        return None if entry is None or size is None else self._number(entry + 8, size)

    def text(self, *path: int) -> bytes:
        """A text of up to four characters; longer ones lie elsewhere."""
        entry = self._entry(path)
        return b"" if entry is None else self._data[entry + 8 : entry + 12]

    def _entry(self, path: tuple[int, ...]) -> int | None:
        """Where the entry begins; None where there is none."""
        directory = self.integer(*path[:-1]) if path[:-1] else self._number(4, 4)
        if directory is None:
            return None
        entries = range(directory + 2, directory + 2 + 12 * self._number(directory, 2), 12)
        whole = (entry for entry in entries if entry + 12 <= len(self._data))
        return next((entry for entry in whole if self._number(entry, 2) == path[-1]), None)

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self._data[at : at + size], "little" if self._data[:2] == b"II" else "big")
