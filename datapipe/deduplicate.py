"""Between the two phases: the whole input's duplicates, from the raw sidecars into one small table, and from there to
each slice."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datapipe.duplicates import exact_duplicates, near_duplicates
from datapipe.schema import Reason, Sample, StageName
from datapipe.shards import Store, iter_tables
from datapipe.stages.screen import ScreenSettings

DUPLICATES_FILE = "duplicates.parquet"

DuplicatesOfSlice = list[tuple[int, int, bool]]
"""(row, row of its original, whether the bytes are the same)"""


def find_all_duplicates(store: Store, settings: ScreenSettings) -> None:
    """Writes the table of duplicates, once every raw shard is there. Rows with a verdict already take no part."""
    if store.exists(DUPLICATES_FILE):
        return
    columns = ["row", "sha256", "phash", "outcome"]
    tables = [t.filter(pc.is_null(t["outcome"])) for t in iter_tables(store, "raw", columns)]
    table = pa.concat_tables(tables).sort_by("row")
    rows = table["row"].to_numpy()
    digests = np.array([bytes.fromhex(h) for h in table["sha256"].to_pylist()], "S32")
    # Equal bytes have equal hashes, so that near duplicates include the exact ones.
    if settings.near_duplicate_bits is not None:
        duplicates, originals = near_duplicates(table["phash"].to_numpy(), settings.near_duplicate_bits)
    elif settings.exact_duplicates:
        duplicates, originals = exact_duplicates(digests)
    else:
        duplicates = originals = np.empty(0, np.int64)
    found = {"row": rows[duplicates], "original": rows[originals], "exact": digests[duplicates] == digests[originals]}
    sink = io.BytesIO()
    pq.write_table(pa.table(found), sink)
    store.put(DUPLICATES_FILE, sink.getvalue())


class DuplicatesBySlice:
    """The table, cut to slices. Twenty-odd bytes a duplicate: it fits the driver's memory for any input there is."""

    def __init__(self, store: Store, slice_rows: int) -> None:
        table = pq.read_table(io.BytesIO(store.read(DUPLICATES_FILE)))
        self._rows, self._originals, self._exact = (table[name].to_numpy() for name in ("row", "original", "exact"))
        self._slice_rows = slice_rows

    def of(self, slice_index: int) -> DuplicatesOfSlice:
        start, stop = np.searchsorted(
            self._rows, [slice_index * self._slice_rows, (slice_index + 1) * self._slice_rows]
        )
        columns = (self._rows, self._originals, self._exact)
        return list(zip(*(column[start:stop].tolist() for column in columns), strict=True))


def mark_duplicates(samples: Sequence[Sample], duplicates: DuplicatesOfSlice) -> list[Sample]:
    """Drops the samples that the table names."""
    by_row = {row: (original, exact) for row, original, exact in duplicates}
    return [_marked(s, *by_row[s.row]) if s.row in by_row else s for s in samples]


def _marked(sample: Sample, original: int, exact: bool) -> Sample:
    reason = Reason.EXACT_DUPLICATE if exact else Reason.NEAR_DUPLICATE
    return sample.dropped(StageName.SCREEN, reason, f"of {Sample(row=original).key}")
