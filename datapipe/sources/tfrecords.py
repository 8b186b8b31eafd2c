"""img2dataset's tfrecords, read in place: records of TensorFlow's `tf.train.Example`, without TensorFlow.

A record is its length (uint64, little-endian), a checksum of it (4 bytes), the data, and a checksum of that (4 bytes).
An Example is protobuf: Example.features(1).feature(1) is a map of key(1) to Feature value(2), which holds a
bytes_list(1), a float_list(2) or an int64_list(3) of value(1).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import IO, Any

from datapipe.sources.columns import columns_of_keys, facts_of
from datapipe.sources.input_files import InputFile
from datapipe.sources.row_index import DamagedError, Found, ImagePlace, InputRow
from datapipe.sources.settings import SourceSettings
from datapipe.sources.tar_keys import IMAGE_ENDINGS

RECORD_LIMIT = 1 << 30
_HEAD, _CHECKSUM = 12, 4
_VARINT, _LENGTH = 0, 2  # wire types of protobuf
_FIXED = {1: 8, 5: 4}

Span = tuple[int, int]


def read_tfrecords(table: IO[bytes], file: InputFile, settings: SourceSettings, found: Found) -> Iterator[InputRow]:
    """Every record, with the place of its image. One record is held at a time. Raises DamagedError."""
    at = number = 0
    while head := table.read(_HEAD):
        size = struct.unpack("<Q", head[:8])[0] if len(head) == _HEAD else RECORD_LIMIT + 1
        data = table.read(size + _CHECKSUM) if size <= RECORD_LIMIT else b""
        if len(data) != size + _CHECKSUM:
            raise DamagedError(
                f"input {file.url}: ends, or is no tfrecord, after {number} records; download it again or take it away"
            )
        try:
            features, numbers = _features(memoryview(data)[:size])
        except (ValueError, IndexError, struct.error):
            yield InputRow.lost(f"{file.name}: record {number} is no tf.train.Example; write it again")
        else:
            texts: dict[str, Any] = {n: data[a:b] for n, (a, b) in features.items() if n not in IMAGE_ENDINGS}
            image = next((features[name] for name in IMAGE_ENDINGS if name in features), None)
            yield _row(texts | numbers, image, at + _HEAD, file, settings)
        at, number = at + _HEAD + size + _CHECKSUM, number + 1
    found.words = found.words or "images and texts as img2dataset saved them"


def _row(record: dict[str, Any], image: Span | None, start: int, file: InputFile, settings: SourceSettings) -> InputRow:
    facts = facts_of(record, columns_of_keys(tuple(record), settings), settings)
    if image is None:
        return InputRow(facts, problem="" if facts.url else f"{file.name}: a record has no image")
    return InputRow(facts, ImagePlace(os.fsencode(file.name), start + image[0], image[1] - image[0]))


def _features(data: memoryview) -> tuple[dict[str, Span], dict[str, float]]:
    """The place of the first bytes of each feature that has bytes, in the record; the first float of those with floats.
    Raises ValueError, IndexError."""
    found: dict[str, Span] = {}
    numbers: dict[str, float] = {}
    for features in _fields(data, 0, len(data), 1):
        for entry in _fields(data, *features, 1):
            key, value = next(_fields(data, *entry, 1), (0, 0)), next(_fields(data, *entry, 2), (0, 0))
            name = bytes(data[slice(*key)]).decode()
            for texts in _fields(data, *value, 1):
                for span in _fields(data, *texts, 1):
                    found.setdefault(name, span)
            for floats in _fields(data, *value, 2):
                for start, end in _fields(data, *floats, 1):  # packed
                    numbers.setdefault(name, struct.unpack_from("<f", data[start:end])[0])
    return found, numbers


def _fields(data: memoryview, at: int, end: int, wanted: int) -> Iterator[Span]:
    """The places of a message's fields of this number that hold bytes."""
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _LENGTH:
            size, at = _varint(data, at)
            if at + size > end:
                raise ValueError("a field is longer than its message")
            if tag >> 3 == wanted:
                yield at, at + size
            at += size
        elif kind in _FIXED:
            at += _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
