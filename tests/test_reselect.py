"""Thresholds changed without a model give the bytes that a full run gives."""

from __future__ import annotations

import json
import shutil

import pytest

from datapipe.shards import verify
from tests.toy import MADE_SELECT, Made, digests, make

LOOSER: dict[str, object] = {"min_score": 0.4, "min_entities": 1, "max_entities": 2, "nms_iou": 0.4}


@pytest.fixture(scope="module")
def full(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A full run with looser settings, and looser or stricter than `made` at the same time."""
    folder = tmp_path_factory.mktemp("full") / "toy"
    make(folder, LOOSER)
    return Made(folder, made.truth)


def options(select: dict[str, object]) -> list[str]:
    return [word for key, value in select.items() for word in ("--set", f"select.{key}={value}")]


def shards(made: Made) -> dict[str, str]:
    """Digests of all that is in a dataset but what only a full run has: the raw shards, their duplicates, and the toy
    world's word on who is who, whose numbers of entities are those of one selection."""
    full_runs = ("duplicates.parquet", "identities.parquet")
    return {n: d for n, d in digests(made.folder).items() if not n.startswith("raw-") and n not in full_runs}


def test_looser_settings_give_the_bytes_of_a_full_run(sdd, made, full, tmp_path):
    code, printed, _ = sdd("reselect", made.folder, *options(LOOSER), "--out", tmp_path / "new")
    assert code == 0
    assert "kept" in printed
    new = Made(tmp_path / "new", made.truth)
    assert shards(new) == shards(full) != shards(made)
    assert list(verify(new.store)) == []


def test_stricter_settings_give_the_bytes_of_a_full_run_without_its_raw_shards(sdd, made, full, tmp_path):
    bare = shutil.copytree(full.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("raw-*"))
    select = {**MADE_SELECT, "max_entities": "null", "nms_iou": 0.5}
    code, _, error = sdd("reselect", bare, *options(select), "--out", tmp_path / "new")
    assert code == 0, error
    assert shards(Made(tmp_path / "new", made.truth)) == shards(made)


def test_what_was_done_is_not_done_again(sdd, made, tmp_path):
    command = ["reselect", made.folder, *options(LOOSER), "--out", tmp_path / "new"]
    sdd(*command)
    before = digests(tmp_path / "new")
    (tmp_path / "new" / "shard-000001.manifest.json").unlink()
    untouched = (tmp_path / "new" / "shard-000000.tar").stat().st_mtime_ns
    assert sdd(*command)[0] == 0
    assert digests(tmp_path / "new") == before
    assert (tmp_path / "new" / "shard-000000.tar").stat().st_mtime_ns == untouched


def test_settings_that_need_a_model_are_refused(refused, made, tmp_path):
    new = tmp_path / "new"
    for setting in ("ground.floor=0.1", "caption.num_beams=1", "screen.near_duplicate_bits=2", "slice_rows=10"):
        assert "needs a model run" in refused("reselect", made.folder, "--set", setting, "--out", new)
    assert "already" in refused("reselect", made.folder, "--set", "select.min_score=0.88", "--out", new)
    assert "select.min_score" in refused("reselect", made.folder, "--set", "select.min_score=2", "--out", new)
    assert "did you mean" in refused("reselect", made.folder, "--set", "select.min_scor=0.5", "--out", new)
    assert not new.exists()
    assert "is the dataset itself" in refused("reselect", made.folder, *options(LOOSER), "--out", made.folder)


def test_images_that_are_gone_are_said_to_be(refused, copied, tmp_path):
    for path in copied.glob("raw-*"):
        path.unlink()
    error = refused("reselect", copied, *options(LOOSER), "--out", tmp_path / "new")
    assert "its image went with the raw shards" in error


def test_a_folder_that_is_no_whole_dataset_is_refused(refused, copied, tmp_path):
    loosened = [*options(LOOSER), "--out", tmp_path / "new"]
    assert "no run.json" in refused("reselect", tmp_path, *loosened)
    (copied / "shard-000001.manifest.json").unlink()
    assert "1 of 3 shards are missing" in refused("reselect", copied, *loosened)
    (copied / "run.json").write_text(json.dumps({"rows": 3}))
    assert "not the record of a run" in refused("reselect", copied, *loosened)


def test_a_folder_of_another_recipe_is_not_filled(refused, sdd, made, tmp_path):
    new = tmp_path / "new"
    assert sdd("reselect", made.folder, *options(LOOSER), "--out", new)[0] == 0
    assert "another recipe" in refused("reselect", made.folder, "--set", "select.min_score=0.7", "--out", new)
