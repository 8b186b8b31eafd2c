"""Which entities of a dataset are the same subject, as `schema.IDENTITIES` says it."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.schema import IDENTITIES, IDENTITIES_SCHEMA
from datapipe.shards.store import Store
from subject_diffusion.errors import RunError, ShardError, one_line
from subject_diffusion.storage import named_errors


def read_identities(store: Store, name: str = IDENTITIES) -> Iterator[tuple[str, int, str]]:
    """(key of the sample, number of the entity, identity) of every row, in the file's order; what is held is a batch.
    Raises RunError, ShardError."""
    where = f"{store.root}/{name}"
    with named_errors(where, ShardError), store.open(name) as file:
        try:
            parquet = pq.ParquetFile(file)
            missing = [name for name in IDENTITIES_SCHEMA.names if name not in parquet.schema_arrow.names]
            if missing:
                raise RunError(f"{where}: no column {missing[0]!r}; it needs {', '.join(IDENTITIES_SCHEMA.names)}")
            for batch in parquet.iter_batches(columns=IDENTITIES_SCHEMA.names):
                yield from _rows(batch, where)
        except pa.ArrowInvalid as error:
            raise RunError(f"{where}: no parquet file ({one_line(error)})") from None


def _rows(batch: pa.RecordBatch, where: str) -> Iterator[tuple[str, int, str]]:
    try:
        columns = [batch.column(field.name).cast(field.type).to_pylist() for field in IDENTITIES_SCHEMA]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RunError(f"{where}: {one_line(error)}; key and identity are strings, entity an integer") from None
    if any(None in column for column in columns):
        raise RunError(f"{where}: a cell is empty; leave out the rows of entities whose identity is not known")
    yield from zip(*columns, strict=True)
