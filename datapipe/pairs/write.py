"""What was found, as the tables that the trainer and people read."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datapipe.pairs.clusters import Identities, identity_name
from datapipe.pairs.decide import REJECTIONS, Decision, Scores
from datapipe.pairs.files import Entities
from datapipe.pairs.scores import Candidates
from datapipe.schema import IDENTITIES, IDENTITIES_SCHEMA
from datapipe.schema.pairs import GIVEN_IDENTITIES, PAIRS, PAIRS_SCHEMA, PairRejection
from datapipe.shards import Store, read_identities
from subject_diffusion.errors import RunError
from subject_diffusion.storage import named_errors, whole_file

_FOUND_BY = {b"found_by": b"sdd pairs"}
_ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Found:
    """Counts. rejected: of candidates, by why; None: pairs. images: of an identity, its number to how many identities
    have it."""

    entities: int
    rejected: Mapping[PairRejection | None, int]
    images: Mapping[int, int]

    @property
    def identities(self) -> int:
        return sum(self.images.values())


def write_found(
    store: Store, entities: Entities, pairs: Candidates, scores: Scores, decision: Decision, identities: Identities
) -> Found:
    """Writes `pairs.parquet` and `identities.parquet`; an `identities.parquet` that others wrote is kept beside."""
    with (
        named_errors(f"{store.root}/{PAIRS}", RunError),
        whole_file(store.path_of(PAIRS), store.file_system) as file,
        pq.ParquetWriter(file, PAIRS_SCHEMA, compression="zstd") as writer,
    ):
        for start in range(0, len(pairs), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            writer.write_table(_pairs_table(entities, pairs, scores, decision, identities, rows))
    _keep_given(store)
    sink = io.BytesIO()
    pq.write_table(_identities_table(entities, identities), sink)
    store.put(IDENTITIES, sink.getvalue())
    counts = Counter(REJECTIONS[number] for number in identities.rejected.tolist())
    sizes = Counter(Counter(identities.of.values()).values())
    return Found(len(entities), counts, dict(sorted(sizes.items())))


def _pairs_table(
    entities: Entities, pairs: Candidates, scores: Scores, decision: Decision, identities: Identities, rows: slice
) -> pa.Table:
    a, b, rejected = pairs.a[rows], pairs.b[rows], identities.rejected[rows]
    reasons = pa.array([r and r.value for r in REJECTIONS], pa.string())
    columns = {
        "key_a": _keys(entities.row[a]),
        "entity_a": entities.entity[a],
        "tag_a": entities.tag[a],
        "key_b": _keys(entities.row[b]),
        "entity_b": entities.entity[b],
        "tag_b": entities.tag[b],
        "similarity": pairs.similarity[rows],
        "patch_similarity": scores.patch_similarity[rows],
        "aligned": scores.aligned[rows],
        "rank_a": _or_null(pairs.rank_a[rows]),
        "rank_b": _or_null(pairs.rank_b[rows]),
        "copy_bits": scores.copy_bits[rows],
        "seconds": pa.array(scores.seconds[rows], from_pandas=True),
        "rival": pa.array(decision.rival[rows], from_pandas=True),
        "margin": pa.array(decision.margin[rows], from_pandas=True),
        "rejected": reasons.take(pa.array(rejected)),
        "identity": [
            identity_name(entities, identities.of[one]) if why == 0 else None
            for one, why in zip(a.tolist(), rejected.tolist(), strict=True)
        ],
    }
    return pa.table({name: pa.array(column, PAIRS_SCHEMA.field(name).type) for name, column in columns.items()})


def _identities_table(entities: Entities, identities: Identities) -> pa.Table:
    numbers = np.array(sorted(identities.of), np.int64)
    names = [identity_name(entities, identities.of[n]) for n in numbers.tolist()]
    columns = [_keys(entities.row[numbers]), entities.entity[numbers].astype(np.int64), names]
    table = pa.Table.from_arrays([pa.array(c) for c in columns], names=IDENTITIES_SCHEMA.names)
    return table.cast(IDENTITIES_SCHEMA).replace_schema_metadata(_FOUND_BY)


def _keys(rows: NDArray[np.int64]) -> pa.Array:
    return pc.utf8_lpad(pc.cast(pa.array(rows), pa.string()), 10, "0")


def _or_null(ranks: NDArray[np.int16]) -> pa.Array:
    return pa.array(ranks, mask=ranks == 0)


def check_given(store: Store) -> None:
    """Makes sure that the identities that are kept, and compared with, can be read. Raises RunError, ShardError."""
    for name in (IDENTITIES, GIVEN_IDENTITIES):
        if store.exists(name):
            for _ in read_identities(store, name):
                pass


def _keep_given(store: Store) -> None:
    if store.exists(IDENTITIES):
        data = store.read(IDENTITIES)
        if pq.read_schema(io.BytesIO(data)).metadata != _FOUND_BY:
            store.put(GIVEN_IDENTITIES, data)
