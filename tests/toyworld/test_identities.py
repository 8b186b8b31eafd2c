"""Who is who in the toy web, and in a dataset made from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq

from datapipe.schema import IDENTITIES, Sample, Slice, current, from_table
from datapipe.shards import Store, write_shard
from tests.train.datasets import PROVENANCE
from toyworld.identities import write_identities
from toyworld.render.web import render_web_image
from toyworld.server import ToyWebSettings, render
from train.stream.cache import ShardCache
from train.stream.source import Source
from train.trainer.identities import Pairs

ROWS = 60


def everyone(seed: int, identities: int) -> list[tuple[str, int]]:
    scenes = [render_web_image(row, ROWS, seed, identities).scene for row in range(ROWS)]
    return [(s.identity.noun, s.identity.index) for scene in scenes if scene for s in scene.subjects]


def test_webs_of_two_seeds_share_no_individual_and_few_identities_come_again():
    one, other = everyone(0, 3), everyone(1, 3)
    assert not set(one) & set(other)
    for drawn in (one, other):
        assert len({index for _, index in drawn}) == 3
        assert len(set(drawn)) < len(drawn)


def test_every_entity_that_was_found_rightly_gets_its_name_and_the_trainer_pairs_them(tmp_path: Path):
    web = render(ToyWebSettings(images=ROWS, identities=2, seed=5), tmp_path)
    truth = from_table(current(pq.read_table(web.truth)))
    shown = [s for s in truth if s.candidates]
    wrong, *rest = shown[0].candidates
    astray = dataclasses.replace(wrong, box=(0.0, 0.0, 1.0, 1.0))
    found = [
        _kept(shown[0].replace(candidates=(astray, *rest)), web.folder),
        *(_kept(s, web.folder) for s in shown[1:]),
    ]
    store = Store(str(tmp_path / "data"))
    write_shard(store, "shard", Slice(0, tuple(found)), PROVENANCE)

    write_identities(store, web)

    rows = pq.read_table(tmp_path / "data" / IDENTITIES).to_pylist()
    named = {(row["key"], row["entity"]): row["identity"] for row in rows}
    expected = {}
    for sample in found:
        scene = render_web_image(sample.row, ROWS, 5, 2).scene
        assert scene is not None
        for i, subject in enumerate(scene.subjects):
            expected[sample.key, i] = f"{subject.identity.noun} {subject.identity.index}"
    del expected[found[0].key, 0]
    assert named == expected
    pairs = Pairs([Source(str(tmp_path / "data"))], ShardCache(tmp_path / "cache", 1 << 30))
    assert len(pairs) > len(named) / 2


def _kept(sample: Sample, folder: Path) -> Sample:
    """As if the pipeline had found just what was drawn."""
    image = (folder / sample.url.rsplit("/", 1)[-1]).read_bytes() if sample.url else b""
    return sample.replace(
        image=image, sha256="ab" * 32, phash=sample.row, original_width=sample.width, original_height=sample.height
    ).kept()
