"""What is wrong with a dataset folder is named, file by file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from datapipe.schema import RLE, Sample, Slice, Tag
from datapipe.shards import Problem, Provenance, Store, verify, write_shard
from tests.conftest import jpeg, kept_sample
from tests.shards.test_commit import mixed_slice


@pytest.fixture
def store(tmp_path, provenance) -> Store:
    """Two sound shards and the raw shard of the first."""
    store = Store(str(tmp_path))
    for index in range(2):
        write_shard(store, "shard", mixed_slice(index), provenance)
    raw = tuple(s if s.image is None else s.replace(verdict=None, candidates=()) for s in mixed_slice().samples)
    write_shard(store, "raw", Slice(0, raw), provenance)
    return store


def problems_of(samples: Sequence[Sample], folder: Path, provenance: Provenance) -> list[str]:
    """What is said of a shard of these samples."""
    store = Store(str(folder))
    write_shard(store, "shard", Slice(0, tuple(samples)), provenance)
    return [p.what for p in verify(store)]


def rewrite(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_sound_folder_has_no_problems(store):
    assert list(verify(store)) == []


def test_a_flipped_byte_of_the_tar_is_found(store, tmp_path):
    path = tmp_path / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert list(verify(store)) == [Problem("shard-000001.tar", "size or SHA-256 differs from the manifest's")]


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000000.parquet"])
@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_truncated_file_is_named_and_nothing_else(store, tmp_path, name, size):
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:size])
    assert {p.file for p in verify(store)} == {name}


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000000.parquet"])
def test_a_missing_file_is_named(store, tmp_path, name):
    (tmp_path / name).unlink()
    (problem,) = verify(store)
    assert problem.file == name
    assert "no such file" in problem.what


def test_files_without_a_manifest_are_orphans(store, tmp_path):
    (tmp_path / "shard-000001.manifest.json").unlink()
    assert [p.file for p in verify(store)] == ["shard-000001.json", "shard-000001.parquet", "shard-000001.tar"]


def test_the_tars_index_is_other_readers_business(store, tmp_path):
    rewrite(tmp_path, "shard-000000.json", captions="added by another tool")
    (tmp_path / "shard-000001.json").unlink()
    assert list(verify(store)) == []


def test_a_broken_manifest_does_not_hide_the_other_shards(store, tmp_path):
    (tmp_path / "shard-000000.manifest.json").write_text("{")
    (tmp_path / "shard-000001.tar").unlink()
    assert [p.file for p in verify(store)] == ["shard-000000.manifest.json", "shard-000001.tar"]


def test_a_temporary_file_is_told_and_a_shard_that_the_run_should_have_made(store, tmp_path):
    (tmp_path / ".shard-000002.tar.tmp-17-0123abcd").write_bytes(b"half")
    (tmp_path / "run.json").write_text(json.dumps({"parts": [{"rows": 11}], "recipe": {"slice_rows": 5}}))
    temporary, lost = verify(store)
    assert temporary.file == ".shard-000002.tar.tmp-17-0123abcd"
    assert lost.what.startswith("1 of 3 shards are not there, shard-000002 first")


def test_a_record_of_a_run_that_cannot_be_read_is_a_problem(store, tmp_path):
    (tmp_path / "run.json").write_text("[]")
    assert list(verify(store)) == [Problem("run.json", "not the record of a run")]


def test_rows_that_are_not_accounted_for_are_found(store, tmp_path):
    rewrite(tmp_path, "shard-000000.manifest.json", counts={"kept": 3, "dropped": 1})
    said = [p.what for p in verify(store)]
    assert "accounts for 4 of 5 rows" in said
    assert any(what.startswith("counts ") for what in said)


def test_shards_that_overlap_are_found(tmp_path, provenance):
    store = Store(str(tmp_path))
    for index in range(2):
        write_shard(store, "shard", dataclasses.replace(mixed_slice(), index=index), provenance)
    assert list(verify(store)) == [Problem("shard-000001.manifest.json", "starts at row 0, but shard-000000 ends at 5")]


def test_a_final_shard_with_an_undecided_row_is_found(tmp_path, provenance):
    assert problems_of([kept_sample(0).replace(verdict=None)], tmp_path, provenance) == ["1 rows have no verdict"]


def test_the_tar_of_another_shard_is_found_by_its_members(store, tmp_path):
    other, mine = tmp_path / "shard-000001.tar", tmp_path / "shard-000000.tar"
    mine.write_bytes(other.read_bytes())
    said = [p.what for p in verify(store) if p.file == "shard-000000.tar"]
    assert f"{kept_sample(5).key}.jpg: the sidecar knows no such member" in said
    assert f"lacks 6 members, {kept_sample(0).key}.jpg first" in said


ENTITY = kept_sample(0).entities[0]


@pytest.mark.parametrize(
    ("sample", "what"),
    [
        (kept_sample(0).replace(candidates=(dataclasses.replace(ENTITY, box=(4, 4, 49, 24)),)), "outside of the image"),
        (kept_sample(0).replace(candidates=(dataclasses.replace(ENTITY, box=(4, 4, 4, 24)),)), "outside of the image"),
        (kept_sample(0).replace(candidates=(dataclasses.replace(ENTITY, span=(2, 6)),)), "outside of the caption"),
        (kept_sample(0).replace(tags=(Tag("mug", (3, 3)),)), "outside of the caption"),
        (
            kept_sample(0).replace(candidates=(dataclasses.replace(ENTITY, mask=RLE((48, 32), "0")),)),
            "mask of 32 x 48 pixels on an image of 48 x 32",
        ),
        (
            kept_sample(0).replace(candidates=(dataclasses.replace(ENTITY, mask=RLE((32, 48), "0")),)),
            "run lengths do not fill",
        ),
        (kept_sample(0).replace(image=b"GIF89a"), "is no JPEG"),
        (kept_sample(0).replace(image=jpeg(32, 48)), "is of 32 x 48 pixels"),
        (kept_sample(0).replace(image=None), "lacks 2 members"),
    ],
)
def test_an_annotation_that_does_not_fit_its_image_is_found(tmp_path, provenance, sample, what):
    (said,) = problems_of([sample], tmp_path, provenance)
    assert what in said
