"""What is no parquet is read once and written down as one parquet index, from which any slice is a short read."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.schema import SCORES
from datapipe.sources.scanning import shown
from subject_diffusion.errors import RunError, SourceError
from subject_diffusion.storage import file_system, is_local, named_errors, whole_file

INDEX_FOLDER = "input"
"""Where the index lies in the dataset's folder."""
INDEX_VERSION = 4
"""Part of each index's name: raise it when what is written changes."""

ROWS_AT_ONCE = 10_000
PROBLEMS_NAMED = 5

NOT_DOWNLOADED = "img2dataset: "
"""Begins the problem of a row whose image img2dataset could not download. The row itself could be read."""

INDEX_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("alt_text", pa.string()),
        ("licence", pa.string()),
        *((name, pa.float64()) for name in SCORES),
        # Bytes, because file names need not be UTF-8.
        ("image_file", pa.binary()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("image_packed", pa.bool_()),
        ("clip", pa.string()),
        ("time_s", pa.float64()),
        ("problem", pa.string()),
    ]
)


class DamagedError(SourceError):
    """A file of the input whose content is not what it should be; among others, it costs its own rows alone."""

    def about(self, url: str, name: str) -> str:
        """What is wrong, for a row's verdict: with the file's name in the input for its path on this machine."""
        return str(self).removeprefix("input ").replace(url, name)


class NothingReadableError(SourceError):
    """No row of the input can be read; the message is the first one's problem."""


@dataclass(frozen=True)
class RowFacts:
    """What the input says about one row. `scores`: by canonical name, sorted, without the missing ones; `clip` and
    `time_s`: as a Sample's."""

    url: str = ""
    alt_text: str = ""
    licence: str = ""
    scores: tuple[tuple[str, float], ...] = ()
    clip: str | None = None
    time_s: float | None = None


@dataclass(frozen=True)
class ImagePlace:
    """Where a row's image lies. `file`: relative to the input's root, as the file system spells it; `size`: None for
    all of the file; `packed`: the offset is that in the decompressed file."""

    file: bytes
    offset: int
    size: int | None
    packed: bool = False


@dataclass(frozen=True)
class FramePlace:
    """Which frame of which video a row's image is. `file`: as an ImagePlace's; `time_s`: seconds from its start."""

    file: bytes
    time_s: float


@dataclass(frozen=True)
class InputRow:
    """One row of the input. `image`: None for one that has to be fetched; `problem`: why the row could not be read."""

    facts: RowFacts
    image: ImagePlace | FramePlace | bytes | None = None
    problem: str = ""

    @classmethod
    def lost(cls, problem: str) -> InputRow:
        return cls(RowFacts(), problem=problem)


@dataclass
class Found:
    """What was recognized in an input. `words`: which columns, what else; `lost`: rows that could not be read;
    `not_downloaded`: rows whose image img2dataset could not download, where that was counted;
    `problems`: what was wrong with the first of them, `notes`: what a user should know besides, each beginning with the
    name of its file."""

    words: str = ""
    lost: int = 0
    not_downloaded: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, row: InputRow) -> None:
        if row.problem.startswith(NOT_DOWNLOADED):
            self.not_downloaded += 1
        elif row.problem:
            self.lost += 1
            if len(self.problems) < PROBLEMS_NAMED:
                self.problems.append(row.problem)

    def check(self, rows: int) -> None:
        """Raises NothingReadableError, if that is so of an input of so many rows."""
        if self.lost and self.lost == rows:
            raise NothingReadableError(self.problems[0])

    def note(self, note: str) -> None:
        if note not in self.notes and len(self.notes) < PROBLEMS_NAMED:
            self.notes.append(note)


@dataclass(frozen=True)
class Index:
    """An index on disk. `url`: of its parquet file."""

    url: str
    rows: int
    found: Found


def build_index(scratch: str, name: str, rows: Callable[[Found], Iterable[InputRow]]) -> Index:
    """Writes `scratch/input/name.parquet`, unless it is there. `rows` may say in what it is given what it found.

    An input of which no row can be read leaves no index, so that it is read again when it was mended. Raises
    NothingReadableError, SourceError.
    """
    with named_errors(scratch, RunError):
        fs, folder = file_system(f"{scratch.rstrip('/')}/{INDEX_FOLDER}", RunError)
        target = f"{folder}/{name}.parquet"
        if not fs.exists(target):
            fs.makedirs(folder, exist_ok=True)
            with whole_file(target, fs) as file:
                _write(file, rows)
        with fs.open(target, "rb") as file:
            metadata = pq.read_metadata(file)
        found = Found(**json.loads(metadata.metadata[b"found"]))
        return Index(target if is_local(fs) else fs.unstrip_protocol(target), metadata.num_rows, found)


def _write(file: object, rows: Callable[[Found], Iterable[InputRow]]) -> None:
    found, total = Found(), 0
    with pq.ParquetWriter(file, INDEX_SCHEMA, compression="zstd") as writer:
        for chunk in _chunks(shown(rows(found), "rows read")):
            total += len(chunk)
            for row in chunk:
                found.count(row)
            writer.write_table(pa.Table.from_pylist([_record(row) for row in chunk], schema=INDEX_SCHEMA))
        writer.add_key_value_metadata({"found": json.dumps(vars(found))})
    found.check(total)


def _chunks(rows: Iterable[InputRow]) -> Iterator[list[InputRow]]:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield chunk


def _record(row: InputRow) -> dict[str, object]:
    facts, image = row.facts, row.image
    record: dict[str, object] = {
        "url": facts.url,
        "alt_text": facts.alt_text,
        "licence": facts.licence,
        **dict(facts.scores),
        "clip": facts.clip,
        "time_s": facts.time_s,
        "problem": row.problem or None,
    }
    if isinstance(image, ImagePlace):
        record |= {
            "image_file": image.file,
            "image_offset": image.offset,
            "image_size": image.size,
            "image_packed": image.packed,
        }
    elif isinstance(image, FramePlace):
        record |= {"image_file": image.file, "time_s": image.time_s}
    return record


def rows_of_index(url: str, version: str, start: int, stop: int) -> Iterator[InputRow]:
    """Rows `start` to `stop - 1` of an index. `version` tells it from a later one of the same name."""
    with named_errors(url, RunError):
        index, first = _opened(url, version), 0
        for group in range(index.metadata.num_row_groups):
            rows = index.metadata.row_group(group).num_rows
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                yield from map(_row, _group(url, version, group).slice(low, high - low).to_pylist())
            first += rows


@functools.lru_cache(maxsize=4)
def _opened(url: str, version: str) -> pq.ParquetFile:
    fs, inner = file_system(url, RunError)
    return pq.ParquetFile(fs.open(inner, "rb"))


@functools.lru_cache(maxsize=2)
def _group(url: str, version: str, group: int) -> pa.Table:
    return _opened(url, version).read_row_group(group)


def _row(record: Mapping[str, Any]) -> InputRow:
    """Inverse of `_record`."""
    scores = tuple((name, record[name]) for name in SCORES if record[name] is not None)
    clip, time_s = record.get("clip"), record.get("time_s")  # an index of an earlier release has no such columns
    facts = RowFacts(record["url"], record["alt_text"], record["licence"], scores, clip, time_s)
    file, offset = record["image_file"], record["image_offset"]
    image: ImagePlace | FramePlace | None = None
    if offset is not None:
        image = ImagePlace(file, offset, record["image_size"], bool(record["image_packed"]))
    elif file is not None:
        image = FramePlace(file, record["time_s"])
    return InputRow(facts, image, record["problem"] or "")
