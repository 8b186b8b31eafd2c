"""A manifest that was lost is written again, byte for byte, but only for a shard that is whole."""

from __future__ import annotations

import json

import pytest

from datapipe.schema import Slice
from datapipe.shards import Provenance, Store, rebuild_manifests, verify, write_shard
from tests.shards.test_commit import mixed_slice


@pytest.fixture
def store(tmp_path, provenance) -> Store:
    """A shard and its raw shard of one input, and a shard of a second one."""
    store = Store(str(tmp_path))
    parts = [{"rows": len(mixed_slice().samples), "input": "input"}, {"rows": 99, "input": "another"}]
    raw = tuple(s if s.image is None else s.replace(verdict=None, candidates=()) for s in mixed_slice().samples)
    write_shard(store, "raw", Slice(0, raw), provenance)
    write_shard(store, "shard", mixed_slice(0), provenance)
    added = Provenance(provenance.recipe_hash, provenance.code_hash, "another", provenance.models)
    write_shard(store, "shard", mixed_slice(1), added)
    store.put("run.json", json.dumps({"parts": parts, "recipe": {"slice_rows": parts[0]["rows"]}}).encode())
    return store


MANIFESTS = ["raw-000000.manifest.json", "shard-000000.manifest.json", "shard-000001.manifest.json"]


@pytest.mark.parametrize("lost", [[name] for name in MANIFESTS] + [MANIFESTS[:2], MANIFESTS[1:]])
def test_lost_manifests_come_back_as_they_were(store, tmp_path, lost):
    before = {name: (tmp_path / name).read_bytes() for name in lost}
    for name in lost:
        (tmp_path / name).unlink()
    assert list(rebuild_manifests(store)) == lost
    assert {name: (tmp_path / name).read_bytes() for name in lost} == before
    assert [p.file for p in verify(store) if p.file != "run.json"] == []
    assert list(rebuild_manifests(store)) == []


@pytest.mark.parametrize("contents", [b"", b"[[0, 512, 1024]]", b'{"files": {}}', b"\xff\x00"])
def test_what_another_program_wrote_over_a_manifest_is_replaced(store, tmp_path, contents):
    before = (tmp_path / MANIFESTS[1]).read_bytes()
    (tmp_path / MANIFESTS[1]).write_bytes(contents)
    assert list(rebuild_manifests(store)) == MANIFESTS[1:2]
    assert (tmp_path / MANIFESTS[1]).read_bytes() == before


def test_a_damaged_neighbor_tells_nothing_and_the_next_one_is_asked(store, tmp_path):
    before = (tmp_path / MANIFESTS[2]).read_bytes()
    (tmp_path / MANIFESTS[2]).unlink()
    (tmp_path / MANIFESTS[1]).write_text(json.dumps({"schema_version": 99}))
    assert list(rebuild_manifests(store)) == MANIFESTS[2:]
    assert (tmp_path / MANIFESTS[2]).read_bytes() == before


def test_a_manifest_of_another_release_is_left_alone(store, tmp_path):
    (tmp_path / MANIFESTS[1]).write_text(json.dumps({"schema_version": 99}))
    assert list(rebuild_manifests(store)) == []


@pytest.mark.parametrize("damage", ["tar", "parquet", "gone", "no other"])
def test_what_is_not_whole_or_of_unknown_origin_stays_without(store, tmp_path, damage):
    (tmp_path / MANIFESTS[1]).unlink()
    if damage == "gone":
        (tmp_path / "shard-000000.parquet").unlink()
    elif damage == "no other":
        for name in MANIFESTS[::2]:
            (tmp_path / name).unlink()
    else:
        path = tmp_path / f"shard-000000.{damage}"
        data = bytearray(path.read_bytes())
        data[len(data) // 3 :] = b""
        path.write_bytes(data)
    assert list(rebuild_manifests(store)) == []
    assert not (tmp_path / MANIFESTS[1]).exists()
