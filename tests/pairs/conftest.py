"""Look-alikes of the toy world in committed shards, with their true masks."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.pairs import drawn_sample
from datapipe.backends.loading import model_identity
from datapipe.pairs.embed import embedding_fingerprint
from datapipe.pairs.settings import settings_of
from datapipe.pairs.workers import EmbedWorker
from datapipe.schema import IDENTITIES, IDENTITIES_SCHEMA, Slice
from datapipe.shards import Provenance, Store, read_manifest, write_shard
from tests.inspect.conftest import browser, opened  # noqa: F401  (fixtures)
from toyworld.render.look_alikes import look_alikes

NOUNS = ("mug", "fish", "house", "rocket")
IMAGES, SHARDS = 48, 3


def write_dataset(folder: Path) -> Path:
    groups = {noun: [next(look_alikes(noun, "heldout", 3))] for noun in NOUNS}
    store, named = Store(str(folder)), []
    for index in range(SHARDS):
        drawn = [drawn_sample(row, groups) for row in range(index * IMAGES // SHARDS, (index + 1) * IMAGES // SHARDS)]
        named += [
            {"key": sample.key, "entity": number, "identity": who}
            for sample, individuals in drawn
            for number, who in enumerate(individuals)
        ]
        write_shard(store, "shard", Slice(index, tuple(sample for sample, _ in drawn)), Provenance("", "", "", {}))
    pq.write_table(pa.Table.from_pylist(named, IDENTITIES_SCHEMA), folder / IDENTITIES)
    return folder


def embed_here(store: Store, shard: int) -> None:
    """Embeds a shard in this process, as a worker of `sdd pairs` would."""
    settings = settings_of(store, []).embed
    made_from = embedding_fingerprint(settings, model_identity(settings), read_manifest(store, "shard", shard))
    worker = EmbedWorker(store.root, Store(f"{store.root}/pairs").root, settings)
    worker({"shard": shard, "made_from": made_from})


@pytest.fixture(scope="session")
def look_alike_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images in three shards, of twelve individuals, three of each noun in the same colors, with an
    `identities.parquet` of the truth."""
    return write_dataset(tmp_path_factory.mktemp("look-alikes") / "dataset")
