"""Reading a dataset: its sidecars as one Arrow dataset, and its kept samples one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.dataset as pads
from pyarrow.fs import LocalFileSystem

from datapipe.schema import SCHEMA, Sample
from datapipe.shards import Store, kept_samples, present
from subject_diffusion.errors import ShardError


def open_dataset(path: str | Path) -> pads.Dataset:
    """The rows of a dataset, one for every input row, as an Arrow dataset that reads only what is asked of it.

        rows = open_dataset("out/toy")
        table = rows.to_table(columns=["key", "caption"], filter=pc.field("outcome") == "kept")

    polars (`pl.scan_pyarrow_dataset(rows)`) and DuckDB (`duckdb.sql("FROM rows")`) read it as it is. The columns are
    those of the sidecars; see "Data format" in the documentation.

    Args:
        path: A dataset folder: local, s3:// or gs://.

    Returns:
        The sidecars of every committed shard, and of no other. Nothing is read but the folder's listing.

    Raises:
        RunError: There is no such folder.
        ShardError: It holds no committed shard.
    """
    store = Store(str(path), create=False)
    files = [store.path_of(f"shard-{index:06d}.parquet") for index in present(store, "shard")]
    if not files:
        raise ShardError(f"{path}: no committed shard; is this a folder that `sdd dataset` wrote?")
    system = LocalFileSystem() if store.local else fsspec.core.url_to_fs(store.url)[0]
    return pads.dataset(files, schema=SCHEMA, format="parquet", filesystem=system)


def read_samples(path: str | Path) -> Iterator[Sample]:
    """Every kept sample with its image's bytes, in the order of the input.

    Args:
        path: A dataset folder: local, s3:// or gs://.

    Yields:
        Samples. `image` is an encoded JPEG; entities are described at `Labeler.__call__`.

    Raises:
        RunError: There is no such folder.
        ShardError: A file is not the one that its manifest describes.
    """
    return kept_samples(Store(str(path), create=False))
