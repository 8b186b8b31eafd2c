"""Parquet with the images inside, for `datasets`, DuckDB, polars and whatever else reads tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from datapipe.formats.folder import new_folder
from datapipe.formats.labels import Faults
from datapipe.schema import SCHEMA, Sample, to_parquet, to_table
from datapipe.shards import Manifest, Store, kept_of, manifests

IMAGE = "image"
ROWS_PER_GROUP = 100
"""A reader that takes one group at a time holds a few MB of images."""
_SIDECAR_ONLY = {
    "outcome", "stage", "reason", "detail", "retryable", "thumbnail", "image_offset", "image_size", "json_offset",
    "json_size",
}  # fmt: skip


def write_parquet(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes one parquet file per shard with a row per kept image, as `table_of` says. Yields the shards as they are
    done."""
    with new_folder(out) as folder:
        for manifest in manifests(store, "shard"):
            table = table_of(list(kept_of(store, manifest, faults.corrupt)))
            folder.put(f"{manifest.name}.parquet", to_parquet(table, ROWS_PER_GROUP))
            yield manifest


def table_of(samples: Sequence[Sample]) -> pa.Table:
    """The columns of a sidecar, with `entities` in place of its candidates, and `image` as {bytes, path}."""
    table = to_table([s.replace(candidates=s.entities) for s in samples])
    table = table.select([n for n in SCHEMA.names if n not in _SIDECAR_ONLY])
    table = table.rename_columns(["entities" if n == "candidates" else n for n in table.column_names])
    images = [{"bytes": s.image, "path": f"{s.key}.jpg"} for s in samples]
    return table.append_column(IMAGE, pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
