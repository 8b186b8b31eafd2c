"""Who is who in a dataset made from the toy web, for training on the same subject in two images."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.schema import IDENTITIES, IDENTITIES_SCHEMA
from datapipe.shards import Store
from toyworld.score import kept_with_truth, matches
from toyworld.server import ToyWeb


def write_identities(store: Store, web: ToyWeb) -> None:
    """Writes the dataset's `identities.parquet`: of every entity that was found rightly, who was drawn there."""
    individuals = pq.read_table(web.individuals)["names"].to_pylist()
    rows = [
        {"key": found.key, "entity": entity, "identity": individuals[drawn.row][subject]}
        for found, drawn in kept_with_truth(store, web.truth)
        for entity, subject in sorted(matches(found.entities, drawn.candidates).items())
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, IDENTITIES_SCHEMA), sink)
    store.put(IDENTITIES, sink.getvalue())
