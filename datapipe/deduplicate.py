"""Between the two phases: collects the duplicates of the whole input in one small table, from the raw sidecars, and
hands each slice its own."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datapipe.duplicate_search import exact_duplicates, near_duplicates
from datapipe.plan import Part, first_rows
from datapipe.schema import Reason, Sample, StageName
from datapipe.shards import Store, iter_tables, present
from datapipe.stages.screen import ScreenSettings

DUPLICATES_FILE = "duplicates.parquet"

_COLUMNS = ["row", "sha256", "phash", "original_width", "original_height"]
_SCHEMA = pa.schema([("row", pa.int64()), ("original", pa.int64()), ("exact", pa.bool_())])

DuplicatesOfSlice = list[tuple[int, int, bool]]
"""(row, row of its original, whether the bytes are the same)"""


def find_all_duplicates(store: Store, settings: ScreenSettings, parts: Sequence[Part]) -> None:
    """Writes the table of duplicates, once every raw shard is there. Rows that have a verdict are left out.

    Of near duplicates the one with the most pixels as fetched is kept, else thumbnails that come first would take the
    place of photographs; of equally large ones the first. What came into the dataset earlier is kept before what came
    later, so that nothing that was found before changes.
    """
    before, searched = _found_before(store)
    if searched == len(parts):
        return
    table = pa.concat_tables(_screened(store))
    width, height = (table[f"original_{side}"].to_numpy().astype(np.int64) for side in ("width", "height"))
    rows = table["row"].to_numpy()
    part = np.searchsorted(first_rows(parts), rows, side="right")
    # Equal bytes are equally large: of exact duplicates it is always the first one that is kept.
    order = np.lexsort((rows, -width * height, part))
    table, rows = table.take(order), rows[order]
    digests = np.array([bytes.fromhex(h) for h in table["sha256"].to_pylist()], "S32")
    # Equal bytes have equal hashes, so that near duplicates include the exact ones.
    if settings.near_duplicate_bits is not None:
        duplicates, originals = near_duplicates(table["phash"].to_numpy(), settings.near_duplicate_bits)
    elif settings.exact_duplicates:
        duplicates, originals = exact_duplicates(digests)
    else:
        duplicates = originals = np.empty(0, np.int64)
    found = {"row": rows[duplicates], "original": rows[originals], "exact": digests[duplicates] == digests[originals]}
    table = pa.table(found).sort_by("row")
    table = pa.concat_tables([before, table.filter(pc.greater_equal(table["row"], first_rows(parts)[searched]))])
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"parts": str(len(parts))}), sink)
    store.put(DUPLICATES_FILE, sink.getvalue())


def _found_before(store: Store) -> tuple[pa.Table, int]:
    """The table, and how many parts of the dataset it covers."""
    if not store.exists(DUPLICATES_FILE):
        return _SCHEMA.empty_table(), 0
    table = pq.ParquetFile(io.BytesIO(store.read(DUPLICATES_FILE))).read()
    return table.replace_schema_metadata(), int(table.schema.metadata[b"parts"])


def _screened(store: Store) -> Iterator[pa.Table]:
    """What is known of the images that came through screening: from the raw sidecars or, where these were deleted, the
    final ones, which lack only duplicates."""
    raw = set(present(store, "raw"))
    early = pa.array([StageName.FETCH.value, StageName.SCREEN.value, StageName.CUSTOM.value])
    for index in sorted(raw | set(present(store, "shard"))):
        for table in iter_tables(store, "raw" if index in raw else "shard", [*_COLUMNS, "outcome", "stage"], index):
            through = pc.is_null(table["outcome"]) if index in raw else pc.invert(pc.is_in(table["stage"], early))
            yield table.filter(through).select(_COLUMNS)


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
