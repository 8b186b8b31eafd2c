"""Look-alikes of the toy world in committed shards, with their true masks."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datapipe.schema import IDENTITIES, IDENTITIES_SCHEMA, RLE, Entity, Sample, Slice, Tag
from datapipe.shards import Provenance, Store, write_shard
from datapipe.stages.screen import perceptual_hash
from tests.inspect.conftest import browser, opened  # noqa: F401  (fixtures)
from toyworld.render.look_alikes import look_alike_scene, look_alikes

NOUNS = ("mug", "fish", "house", "rocket")
IMAGES, SHARDS = 48, 3
GROUPS = {noun: [next(look_alikes(noun, "heldout", 3))] for noun in NOUNS}


def drawn_sample(row: int) -> tuple[Sample, list[str]]:
    """A kept sample of a scene, and who its entities are."""
    scene = look_alike_scene(row, GROUPS, 128)
    sink = io.BytesIO()
    Image.fromarray(scene.image).save(sink, "JPEG", quality=92)
    entities = tuple(Entity(s.tag, s.span, s.box, 0.9, 0.8, RLE.of(s.mask), 0.95, 0.97) for s in scene.subjects)
    sample = Sample(
        row=row,
        image=sink.getvalue(),
        width=128,
        height=128,
        sha256=f"{row:064x}",
        phash=perceptual_hash(scene.image),
        caption=scene.caption,
        tags=tuple(Tag(s.tag, s.span) for s in scene.subjects),
        candidates=entities,
    )
    return sample.kept(), [f"{s.identity.noun} {s.identity.index}" for s in scene.subjects]


def write_dataset(folder: Path) -> Path:
    store, named = Store(str(folder)), []
    for index in range(SHARDS):
        drawn = [drawn_sample(row) for row in range(index * IMAGES // SHARDS, (index + 1) * IMAGES // SHARDS)]
        named += [
            {"key": sample.key, "entity": number, "identity": who}
            for sample, individuals in drawn
            for number, who in enumerate(individuals)
        ]
        made_with = Provenance("recipe", "code", "input", {})
        write_shard(store, "shard", Slice(index, tuple(sample for sample, _ in drawn)), made_with)
    pq.write_table(pa.Table.from_pylist(named, IDENTITIES_SCHEMA), folder / IDENTITIES)
    return folder


@pytest.fixture(scope="session")
def look_alike_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images in three shards, of twelve individuals, three of each noun in the same colors, with an
    `identities.parquet` of the truth."""
    return write_dataset(tmp_path_factory.mktemp("look-alikes") / "dataset")
