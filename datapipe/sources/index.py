"""What is no parquet is read once and written down as one parquet index, from which any slice is a short read."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.sources.columns import SCORE_NAMES, RowFacts
from datapipe.sources.storage import explained

INDEX_VERSION = 1
"""Part of each index's name: raise it when what is written changes."""

ROWS_AT_ONCE = 10_000

INDEX_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("alt_text", pa.string()),
        ("licence", pa.string()),
        *((name, pa.float64()) for name in sorted(SCORE_NAMES)),
        # Bytes, for file names need not be UTF-8.
        ("image_file", pa.binary()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
    ]
)


@dataclass(frozen=True)
class ImagePlace:
    """Where a row's image lies. `file`: relative to the input's root, as the file system spells it."""

    file: bytes
    offset: int
    size: int


@dataclass(frozen=True)
class IndexRow:
    """One row of the index; `image` is none for a row that has to be fetched."""

    facts: RowFacts
    image: ImagePlace | None = None


def build_index(scratch: str, name: str, rows: Callable[[], Iterable[IndexRow]]) -> tuple[str, int]:
    """Writes `scratch/input/name.parquet`, unless it is there; returns its URL and number of rows."""
    with explained(scratch):
        fs, folder = fsspec.url_to_fs(os.path.expanduser(scratch).rstrip("/") + "/input")
        local = "file" in fs.protocol
        target = f"{folder}/{name}.parquet"
        if not fs.exists(target):
            fs.makedirs(folder, exist_ok=True)
            handle, partial = tempfile.mkstemp(".partial", dir=folder if local else None)
            try:
                with os.fdopen(handle, "wb") as file:
                    _write(file, rows())
                    file.flush()
                    os.fsync(file.fileno())
                if local:
                    os.chmod(partial, 0o644)  # mkstemp's 0600 would shut out workers of another user
                    os.replace(partial, target)
                else:
                    fs.put_file(partial, target)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
        with fs.open(target, "rb") as file:
            count: int = pq.read_metadata(file).num_rows
        return (target if local else fs.unstrip_protocol(target)), count


def _write(file: object, rows: Iterable[IndexRow]) -> None:
    with pq.ParquetWriter(file, INDEX_SCHEMA, compression="zstd") as writer:
        for chunk in _chunks(rows):
            writer.write_table(pa.Table.from_pylist([_record(row) for row in chunk], schema=INDEX_SCHEMA))


def _chunks(rows: Iterable[IndexRow]) -> Iterator[list[IndexRow]]:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield chunk


def _record(row: IndexRow) -> dict[str, object]:
    facts, image = row.facts, row.image
    record: dict[str, object] = {
        "url": facts.url,
        "alt_text": facts.alt_text,
        "licence": facts.licence,
        **dict(facts.scores),
    }
    if image is not None:
        record |= {"image_file": image.file, "image_offset": image.offset, "image_size": image.size}
    return record
