"""A sample's bytes in a tar become its members, its annotation and its pixels."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from datapipe import decoding
from datapipe.image_file import ImageRefusedError
from datapipe.schema import Entity, Sample, from_json
from datapipe.sources.tar_keys import KeyRule, is_clutter, main_image, split_key
from subject_diffusion.errors import ShardError
from train.stream.cache import ShardFile
from train.stream.filter import Filter

_BLOCK = tarfile.BLOCKSIZE
_PLAIN_FILE = (tarfile.REGTYPE, tarfile.AREGTYPE)


class CorruptSampleError(Exception):
    """A sample cannot be used; the stream gives another one in its place. Transforms may raise it, too."""


Span = tuple[int, int]
"""[start, end) of a member's content among a sample's bytes."""


@dataclass(frozen=True)
class RawSample:
    """As it lies in the tar. `members`: contents by what follows the key's dot, in lower case ("jpg", "json",
    "seg.png")."""

    key: str
    members: dict[str, memoryview]
    keep: Filter = field(default_factory=Filter)
    source: str = ""
    """Path of its dataset."""
    shape: tuple[int, int] | None = None
    """Height and width, in pixels, that its batch is cut to, where the stream has buckets."""
    shard: ShardFile | None = None
    """Where it lies."""

    def member(self, *endings: str) -> memoryview:
        """The first of these that there is. Raises CorruptSampleError."""
        for ending in endings:
            if ending in self.members:
                return self.members[ending]
        raise CorruptSampleError(f"no member {' or '.join(endings)}")

    def image(self, least_side_px: int = 0) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 sRGB, upright. With `least_side_px` it may come smaller, down to that shorter side. Raises
        CorruptSampleError."""
        ending = main_image(list(self.members))
        if ending is None:
            raise CorruptSampleError(f"no image among its members ({', '.join(self.members)})")
        return decode_image(self.members[ending], least_side_px)

    def annotation(self) -> Sample:
        """Caption, tags and entities, those that the stream's filter wants. Raises CorruptSampleError."""
        sample = self._unfiltered()
        return sample.replace(candidates=self.keep.entities(sample.entities))

    def every_entity(self) -> tuple[Entity, ...]:
        """Those that the stream's filter does not want, too. Raises CorruptSampleError."""
        return self._unfiltered().entities

    def _unfiltered(self) -> Sample:
        try:
            return from_json(bytes(self.member("json")))
        except ShardError as error:
            raise CorruptSampleError(str(error)) from None


def parse_members(data: memoryview, rule: KeyRule = "first_dot") -> tuple[str, dict[str, Span]]:
    """Key and members of a stretch of a tar that begins with a header. Raises CorruptSampleError when it is none."""
    members: dict[str, Span] = {}
    key, offset = "", 0
    extended: dict[str, str] = {}
    try:
        while offset < len(data):
            header = bytes(data[offset : offset + _BLOCK])
            kind, size = (
                header[156:157],
                int(extended.pop("size", "") or int(header[124:136].rstrip(b"\0 ") or b"0", 8)),
            )
            start, end = offset + _BLOCK, offset + _BLOCK + size
            if not start <= end <= len(data) or header[257:262] != b"ustar":
                raise CorruptSampleError("damaged tar header, or the tar ends early")
            offset = start + -(-size // _BLOCK) * _BLOCK
            if kind == tarfile.XHDTYPE:
                extended = _pax_records(bytes(data[start:end]))
            elif kind == tarfile.GNUTYPE_LONGNAME:
                extended = {"path": bytes(data[start:end]).rstrip(b"\0").decode()}
            elif kind in _PLAIN_FILE:
                name = extended.pop("path", "") or _name(header)
                extended = {}
                if not is_clutter(name):
                    key, ending = split_key(name, rule)
                    members[ending] = (start, end)
    except ValueError as error:
        raise CorruptSampleError(f"damaged tar header ({error})") from None
    return key, members


def _name(header: bytes) -> str:
    # GNU's format, told by the blank after "ustar", keeps other things where POSIX has the prefix.
    prefix = b"" if header[262:263] == b" " else header[345:500].split(b"\0", 1)[0]
    name = header[:100].split(b"\0", 1)[0]
    return (prefix + b"/" + name if prefix else name).decode()


def _pax_records(content: bytes) -> dict[str, str]:
    """ "<length> <keyword>=<value>\\n", again and again; the length counts all of it."""
    records: dict[str, str] = {}
    while content:
        length = int(content[: content.index(b" ")])
        record, content = content[:length], content[length:]
        keyword, _, value = record[record.index(b" ") + 1 : -1].partition(b"=")
        if keyword in (b"path", b"size"):
            records[keyword.decode()] = value.decode()
        if length <= 0:
            raise ValueError("a PAX record of no length")
    return records


def decode_image(data: bytes | memoryview, least_side_px: int = 0) -> NDArray[np.uint8]:
    """As `datapipe.decoding.decode_image`, whose refusal becomes a CorruptSampleError."""
    try:
        return decoding.decode_image(data, least_side_px)
    except ImageRefusedError as refused:
        raise CorruptSampleError(f"damaged image ({refused.reason.value}: {refused.detail})") from None
