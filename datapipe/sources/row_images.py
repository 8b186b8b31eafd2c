"""Rows of an input become samples, with the images that came along."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datapipe.schema import Reason, Sample, StageName
from datapipe.sources.columns import is_in_bucket
from datapipe.sources.input_files import input_file_system, opened
from datapipe.sources.row_index import FramePlace, ImagePlace, InputRow
from datapipe.sources.videos import read_frames
from subject_diffusion.errors import SourceError, one_line
from subject_diffusion.storage import is_local

IMAGE_LIMIT = 512 << 20
"""Bytes of an image that came with its row beyond which it is not read into memory at all."""


IMAGES_AT_ONCE, BYTES_AT_ONCE = 64, 64 << 20
"""That are read together."""

Hold = Callable[[bytes], bytes]


def samples_of(rows: Sequence[InputRow], start: int, root: str, hold: Hold = bytes) -> list[Sample]:
    """The samples of these rows, the first of which is row `start` of the input. An image that is gone fails its row
    alone. `root`: the folder that images are relative to; `hold`: see `InputRows.read`."""
    places = {number: row.image for number, row in enumerate(rows) if isinstance(row.image, ImagePlace)}
    frames = {number: row.image for number, row in enumerate(rows) if isinstance(row.image, FramePlace)}
    images = {**_images(places, root, hold), **_frames(frames, root, hold)}
    return [_sample(row, start + number, images.get(number)) for number, row in enumerate(rows)]


def _sample(row: InputRow, number: int, read: bytes | str | None) -> Sample:
    """`read`: the image from its place, or why there is none."""
    facts = row.facts
    sample = Sample(
        number,
        url=facts.url,
        alt_text=facts.alt_text,
        licence=facts.licence,
        scores=facts.scores,
        clip=facts.clip,
        time_s=facts.time_s,
    )
    if row.problem:
        return sample.failed(StageName.FETCH, Reason.UNREADABLE, row.problem)
    image = row.image if isinstance(row.image, bytes) else read
    if isinstance(image, str):
        return sample.failed(StageName.FETCH, Reason.UNREADABLE, image, retryable=True)
    if isinstance(row.image, ImagePlace) and image is None:
        return sample.failed(StageName.FETCH, Reason.TOO_LARGE, f"more than {IMAGE_LIMIT} bytes")
    return sample.replace(image=image) if image is not None else sample


def _frames(places: dict[int, FramePlace], root: str, hold: Hold) -> dict[int, bytes | str]:
    """By row: the frame, or why it cannot be read. Each video is opened once."""
    by_file: dict[bytes, list[int]] = defaultdict(list)
    for number in sorted(places, key=lambda n: places[n].time_s):
        by_file[places[number].file].append(number)
    found: dict[int, bytes | str] = {}
    for file, numbers in by_file.items():
        read = read_frames(f"{root.rstrip('/')}/{os.fsdecode(file)}", [places[n].time_s for n in numbers])
        held = (hold(frame) if isinstance(frame, bytes) else frame for frame in read)
        found |= dict(zip(numbers, held, strict=True))
    return found


def _images(places: dict[int, ImagePlace], root: str, hold: Hold) -> dict[int, bytes | str]:
    """By row: the image, or why it cannot be read. One that is too large is left out."""
    fitting = {number: place for number, place in places.items() if (place.size or 0) <= IMAGE_LIMIT}
    read = {number: b"" for number, place in fitting.items() if place.size == 0}
    packed = {n: p for n, p in fitting.items() if p.packed and p.size != 0}
    plain = {n: p for n, p in fitting.items() if not p.packed and p.size != 0}
    found = {**read, **_plain_images(plain, root, hold), **_packed_images(packed, root, hold)}
    return {number: image for number, image in found.items() if len(image) <= IMAGE_LIMIT}


def _plain_images(places: dict[int, ImagePlace], root: str, hold: Hold) -> dict[int, bytes | str]:
    """Many at once: in a bucket, most of the time is waiting."""
    by_store: dict[Any, dict[int, str]] = defaultdict(dict)
    for number, place in places.items():
        fs, path = _located(place, root)
        by_store[fs][number] = path
    found: dict[int, bytes | str] = {}
    for fs, paths in by_store.items():
        for some in _read_at_once({number: places[number].size for number in paths}):
            wanted = [places[number] for number in some]
            starts = [p.offset for p in wanted]
            ends = [p.offset + (p.size if p.size is not None else IMAGE_LIMIT + 1) for p in wanted]
            read = fs.cat_ranges([paths[number] for number in some], starts, ends, on_error="return")
            found |= {number: _checked(places[number], data, hold) for number, data in zip(some, read, strict=True)}
    return found


def _read_at_once(sizes: Mapping[int, int | None]) -> Iterator[list[int]]:
    """The keys in order, in parts of so many images and bytes that are held until all of them have come."""
    part: list[int] = []
    left = BYTES_AT_ONCE
    for number, size in sizes.items():
        left -= size or 0
        if part and (left < 0 or len(part) == IMAGES_AT_ONCE):
            yield part
            part, left = [], BYTES_AT_ONCE - (size or 0)
        part.append(number)
    if part:
        yield part


def _checked(place: ImagePlace, data: bytes | Exception, hold: Hold) -> bytes | str:
    """What was read, or what is wrong with it."""
    name = os.fsdecode(place.file)
    if not isinstance(data, bytes):
        return f"{name}: {type(data).__name__}"
    return hold(data) if place.size in (None, len(data)) else f"{name}: {len(data)} of {place.size} bytes"


def _located(place: ImagePlace, root: str) -> tuple[Any, str]:
    """The file system of a place, and the path within it."""
    file = os.fsdecode(place.file)
    if is_in_bucket(file):
        return input_file_system(file)
    fs, inner = input_file_system(root)
    # A table on this machine may name files anywhere on it, as open_clip's do; one in a bucket may not.
    return fs, file if is_local(fs) and os.path.isabs(file) else f"{inner.rstrip('/')}/{file.lstrip('/')}"


def _packed_images(places: dict[int, ImagePlace], root: str, hold: Hold) -> dict[int, bytes | str]:
    """From compressed tars, which are read from their start, each once."""
    by_file: dict[bytes, list[int]] = defaultdict(list)
    for number, place in places.items():
        by_file[place.file].append(number)
    found: dict[int, bytes | str] = {}
    for file, numbers in by_file.items():
        try:
            with opened(f"{root.rstrip('/')}/{os.fsdecode(file)}") as tar:
                for number in sorted(numbers, key=lambda n: places[n].offset):
                    tar.seek(places[number].offset)
                    found[number] = hold(tar.read(places[number].size or 0))
        except SourceError as error:
            found |= {number: one_line(error) for number in numbers if number not in found}
    return found
