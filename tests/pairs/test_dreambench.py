"""Photographs of 30 subjects, four to seven of each: whatever the toy encoder makes of them, all is accounted for, and
a benchmark keeps itself out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datapipe.inspect.pair_agreement import agreement
from datapipe.pairs.run import find_pairs
from datapipe.pairs.settings import settings_of
from datapipe.schema import IDENTITIES, IDENTITIES_SCHEMA, RLE, Entity, Sample, Slice
from datapipe.schema.pairs import PAIRS, PairRejection
from datapipe.shards import Provenance, Store, write_shard
from datapipe.stages.screen import ScreenSettings, perceptual_hash
from tests.pairs.conftest import embed_here
from tests.test_photographs import PHOTOGRAPHS


def photograph(row: int, file: Path) -> Sample:
    """As a kept sample, whose entity is what the middle of the photograph shows."""
    normal = ScreenSettings().normalize(file.read_bytes())
    height, width = normal.pixels.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    middle = Entity(file.parent.name, (0, 1), (0.0, 0.0, float(width), float(height)), 1, 1, RLE.of(x**2 + y**2 < 0.6))
    return Sample(
        row=row,
        image=normal.data,
        width=width,
        height=height,
        phash=perceptual_hash(normal.pixels),
        caption=file.parent.name,
        candidates=(middle,),
    ).kept()


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="no DreamBooth dataset; SDD_DREAMBENCH names its folder")
def test_pairs_of_photographs_are_accounted_for_and_a_benchmark_is_kept_out(tmp_path):
    files = sorted(PHOTOGRAPHS.rglob("*.jpg"))
    small = tmp_path / "photographs"
    for file in files:
        place = small / file.parent.name / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.open(file)
        picture.draft("RGB", (256, 256))
        picture.convert("RGB").resize((128, 128)).save(place, quality=95)
    store = Store(str(tmp_path / "dataset"))
    samples = [photograph(row, small / f.parent.name / f.name) for row, f in enumerate(files)]
    write_shard(store, "shard", Slice(0, tuple(samples)), Provenance("", "", "", {}))
    named = [{"key": s.key, "entity": 0, "identity": s.caption} for s in samples]
    pq.write_table(pa.Table.from_pylist(named, IDENTITIES_SCHEMA), tmp_path / "dataset" / IDENTITIES)
    embed_here(store, 0)

    found = find_pairs(store, settings_of(store, []))
    assert found.entities == len(files) == 158
    met = agreement(store)
    assert met is not None and met.there == sum(n * (n - 1) // 2 for n in Counter(s.caption for s in samples).values())
    assert sum(found.rejected.values()) == pq.read_metadata(tmp_path / "dataset" / PAIRS).num_rows > 0

    kept_out = find_pairs(store, settings_of(store, []), exclude=str(small))
    assert set(kept_out.rejected) == {PairRejection.EXCLUDED} and kept_out.identities == 0
