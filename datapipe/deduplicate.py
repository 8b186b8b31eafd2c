"""Between the two phases: collects the duplicates of the whole input in one small table, from the raw sidecars, and
hands each slice its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datapipe.duplicate_search import FindPaired, exact_duplicates, near_duplicates
from datapipe.growing import rows_done_again
from datapipe.plan import Part, first_rows
from datapipe.schema import Reason, Sample, StageName
from datapipe.shards import Store, iter_tables, present
from datapipe.shards.read_ahead import read_ahead
from datapipe.stages.screen import ScreenSettings

DUPLICATES_FILE = "duplicates.parquet"

_COLUMNS = ["row", "sha256", "phash", "original_width", "original_height"]
_SCHEMA = pa.schema([("row", pa.int64()), ("original", pa.int64()), ("exact", pa.bool_())])

Numbers = NDArray[np.int64]

DuplicatesOfSlice = list[tuple[int, int, bool]]
"""(row, row of its original, whether the bytes are the same)"""


def find_all_duplicates(
    store: Store, settings: ScreenSettings, parts: Sequence[Part], find_paired: FindPaired | None = None
) -> None:
    """Writes the table of duplicates, once every raw shard is there. Rows that have a verdict are left out.

    Of near duplicates the one with the most pixels as fetched is kept, else thumbnails that come first would take the
    place of photographs; of equally large ones the first. What came into the dataset earlier is kept before what came
    later, so that nothing that was found before changes. `find_paired`: see `near_duplicates`.

    Where none are sought, the raw shards are not needed.
    """
    before, searched = _found_before(store)
    if searched == len(parts):
        return
    if not settings.seeks_duplicates:
        write_duplicates(store, before, len(parts))
        return
    images = screened_images(store, np.fromiter(rows_done_again(store, parts), np.int64))
    part = np.searchsorted(first_rows(parts), images.row, side="right")
    # Equal bytes are equally large: of exact duplicates it is always the first one that is kept.
    order = np.lexsort((images.row, -images.pixels, part))
    # Equal bytes have equal hashes, so that near duplicates include the exact ones.
    if settings.near_duplicate_bits is not None:
        duplicates, originals = near_duplicates(images.phash[order], settings.near_duplicate_bits, find_paired)
    else:
        duplicates, originals = exact_duplicates(images.digest[order])
    duplicates, originals = order[duplicates], order[originals]
    exact = images.digest[duplicates] == images.digest[originals]
    found = duplicates_table(images.row[duplicates], images.row[originals], exact)
    found = found.filter(pc.greater_equal(found["row"], first_rows(parts)[searched]))
    write_duplicates(store, pa.concat_tables([before, found]), len(parts))


def duplicates_table(row: Numbers, original: Numbers, exact: NDArray[np.bool_]) -> pa.Table:
    """In the order of the duplicates' rows."""
    return pa.table({"row": row, "original": original, "exact": exact}, schema=_SCHEMA).sort_by("row")


def write_duplicates(store: Store, table: pa.Table, parts: int) -> None:
    """`parts`: how many of the dataset it covers."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"parts": str(parts)}), sink)
    store.put(DUPLICATES_FILE, sink.getvalue())


def _found_before(store: Store) -> tuple[pa.Table, int]:
    """The table, and how many parts of the dataset it covers."""
    if not store.exists(DUPLICATES_FILE):
        return _SCHEMA.empty_table(), 0
    table = pq.ParquetFile(io.BytesIO(store.read(DUPLICATES_FILE))).read()
    return table.replace_schema_metadata(), int(table.schema.metadata[b"parts"])


@dataclass(frozen=True)
class ScreenedImages:
    """What is known of N images, 56 bytes each. `digest`: (N,) S32, SHA-256; `phash`: (N,) uint64; the others (N,)
    int64, `pixels` as fetched."""

    row: Numbers
    digest: NDArray[np.bytes_]
    phash: NDArray[np.uint64]
    pixels: Numbers


def screened_images(store: Store, without: Numbers) -> ScreenedImages:
    """The images that came through screening: from the raw sidecars or, where these were deleted, the final ones, which
    lack only duplicates. `without`: rows that are left out, because others do them again."""
    raw = set(present(store, "raw"))
    early = pa.array([StageName.FETCH.value, StageName.SCREEN.value, StageName.CUSTOM.value])
    without = np.sort(without)

    def of_shard(index: int) -> list[ScreenedImages]:
        found = []
        for table in iter_tables(store, "raw" if index in raw else "shard", [*_COLUMNS, "outcome", "stage"], index):
            through = pc.is_null(table["outcome"]) if index in raw else pc.invert(pc.is_in(table["stage"], early))
            images = _images_of(table.filter(through))
            left = ~_contains(without, images.row)
            found.append(ScreenedImages(*(getattr(images, field.name)[left] for field in fields(ScreenedImages))))
        return found

    columns: dict[str, list[NDArray[Any]]] = {field.name: [] for field in fields(ScreenedImages)}
    for of_one in read_ahead(store, of_shard, sorted(raw | set(present(store, "shard")))):
        for images in of_one:
            for name, column in columns.items():
                column.append(getattr(images, name))
    # Column by column, so that no more than one is there twice.
    return ScreenedImages(**{name: np.concatenate(columns.pop(name)) for name in list(columns)})


def _contains(ascending: Numbers, wanted: Numbers) -> NDArray[np.bool_]:
    """Whether each of `wanted` (N,) is among `ascending`: (N,)."""
    places = np.searchsorted(ascending, wanted)
    found: NDArray[np.bool_] = np.append(ascending, -1)[places] == wanted
    return found


def _images_of(table: pa.Table) -> ScreenedImages:
    width, height = (table[f"original_{side}"].to_numpy().astype(np.int64) for side in ("width", "height"))
    digests = np.frombuffer(bytes.fromhex("".join(table["sha256"].to_pylist())), "S32")
    return ScreenedImages(table["row"].to_numpy(), digests, table["phash"].to_numpy(), width * height)


class DuplicatesBySlice:
    """The table, cut into slices. At some 20 bytes per duplicate, it fits the driver's memory for any input."""

    def __init__(self, store: Store) -> None:
        table = pq.ParquetFile(io.BytesIO(store.read(DUPLICATES_FILE))).read()
        self._rows, self._originals, self._exact = (table[name].to_numpy() for name in ("row", "original", "exact"))

    def of(self, rows: range) -> DuplicatesOfSlice:
        """Those of a slice, by its rows."""
        start, stop = np.searchsorted(self._rows, [rows.start, rows.stop])
        columns = (self._rows, self._originals, self._exact)
        return list(zip(*(column[start:stop].tolist() for column in columns), strict=True))


def mark_duplicates(samples: Sequence[Sample], duplicates: DuplicatesOfSlice) -> list[Sample]:
    """Drops the samples that the table names."""
    by_row = {row: (original, exact) for row, original, exact in duplicates}
    return [_marked(s, *by_row[s.row]) if s.row in by_row else s for s in samples]


def _marked(sample: Sample, original: int, exact: bool) -> Sample:
    reason = Reason.EXACT_DUPLICATE if exact else Reason.NEAR_DUPLICATE
    return sample.dropped(StageName.SCREEN, reason, f"of {Sample(row=original).key}")
