"""SQL over the sidecars, one shard at a time: memory stays flat, and the first rows come at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from datapipe.schema import SCHEMA, StageName
from datapipe.shards import Manifest, Store, manifests
from subject_diffusion.errors import QueryError, ShardError, one_line
from subject_diffusion.storage import named_errors

View = Literal["images", "candidates"]

VIEWS: dict[View, str] = {
    "images": """
        SELECT {shard} AS shard, *, list_filter(candidates, lambda c: c.rejected IS NULL) AS entities FROM sidecar""",
    "candidates": f"""
        SELECT {{shard}} AS shard, row, key, url, caption, width, height, outcome, '{StageName.SELECT.value}' AS stage,
            c.rejected AS reason, c.tag, c.span, c.box, c.score, c.text_score, c.rival_score, c.mask, c.predicted_iou,
            c.stability, c.desc,
            (c.box[3] - c.box[1]) * (c.box[4] - c.box[2]) / (width * height) AS area,
            (c.box[3] - c.box[1]) / (c.box[4] - c.box[2]) AS aspect
        FROM (SELECT *, unnest(candidates) AS c FROM sidecar)""",
}
"""images: the columns of `schema.SCHEMA`, one row for every input row, with its shard and its accepted candidates as
`entities`. candidates: one row for every raw candidate box; `reason` says why it is no entity, and is null when it is
one; `area` is a fraction of the image, `aspect` width / height."""


def select(
    store: Store,
    columns: str,
    where: str = "true",
    *,
    view: View = "images",
    shards: Iterable[Manifest] | None = None,
    best: tuple[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of a view, shard after shard (all, or some). `columns`: ours; `where`: the user's. `best`: (what to order
    by, how many) of each shard. Raises QueryError, and ShardError for a sidecar that cannot be read."""
    connection = duckdb.connect(":memory:")
    # The user's SQL sees the one registered table: no files, no network, no Python variables, and no way back.
    for setting in ("enable_external_access", "python_enable_replacements"):
        connection.execute(f"SET {setting} = false")
    connection.execute("SET lock_configuration = true")
    for manifest in manifests(store, "shard") if shards is None else shards:
        connection.register("sidecar", _open(store, manifest))
        try:
            found = connection.sql(VIEWS[view].format(shard=manifest.index)).filter(where)
            if best is not None:
                found = found.order(best[0]).limit(best[1])
            for batch in found.project(columns).to_arrow_reader():
                yield from batch.to_pylist()
        except duckdb.Error as error:
            said = str(error).split("LINE 1:")[0]
            raise QueryError(f"--where {where}: {' '.join(said.split())}") from None
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"{store.root}/{manifest.name}.parquet: {one_line(error)}") from None


def quoted(text: str) -> str:
    """A string as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _open(store: Store, manifest: Manifest) -> pads.Dataset:
    """Lazily: only the columns that a query names are read. Fields that an earlier release did not know are null."""
    name = f"{manifest.name}.parquet"
    with named_errors(f"{store.root}/{name}", ShardError):
        try:
            filesystem = None if store.local else store.file_system
            found = pads.dataset(store.path_of(name), filesystem=filesystem, format="parquet")
            return pads.dataset(found.files, SCHEMA, filesystem=found.filesystem, format=found.format)
        except pa.ArrowInvalid:
            raise ShardError(
                f"{store.root}/{name}: not the file its manifest describes; remove the manifest to have it made again"
            ) from None
