"""Hugging Face `datasets` loads shards, sidecars and exports, maps over them, and writes them, with any scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_dataset

from datapipe.schema import Outcome, Reason, Slice, StageName
from datapipe.shards import Store, kept_samples, write_shard
from tests.conftest import kept_sample

ALL = (("aesthetic", 5.5), ("punsafe", 0.01), ("pwatermark", 0.02), ("similarity", 0.3))
SCORES: dict[str, list[tuple[tuple[str, float], ...]]] = {
    "empty": [()] * 8,
    "filled": [ALL] * 8,
    "mixed": [(), ALL[:1], ALL[1:3], (), (), ALL, (), ALL[3:]],
    "late": [()] * 7 + [ALL],
}
PARQUET = ("sidecar", "export")


@pytest.fixture(params=SCORES)
def folder(request, tmp_path, provenance, monkeypatch) -> Path:
    """Eight kept samples and a dropped one; among the last are values that the first do not have."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    samples = [kept_sample(row).replace(scores=scores) for row, scores in enumerate(SCORES[request.param])]
    samples[0] = samples[0].replace(http_status=None, phash=None)
    dropped = kept_sample(8).replace(image=None, verdict=None).dropped(StageName.SCREEN, Reason.TOO_SMALL)
    write_shard(Store(str(tmp_path / "set")), "shard", Slice(0, (*samples, dropped)), provenance)
    folder: Path = tmp_path / "set"
    return folder


@pytest.mark.parametrize("kind", [*PARQUET, "shards"])
def test_it_is_loaded_mapped_written_and_loaded_again(folder, tmp_path, sdd, kind):
    if kind == "export":
        assert sdd("export", folder, "--to", "parquet", "--out", tmp_path / "export")[0] == 0
    files = {"shards": folder / "*.tar", "sidecar": folder / "shard-*.parquet", "export": tmp_path / "export/*.parquet"}
    cache = str(tmp_path / "cache")
    builder = "webdataset" if kind == "shards" else "parquet"
    data = load_dataset(builder, data_files=str(files[kind]), split="train", cache_dir=cache)
    samples = list(kept_samples(Store(str(folder))))
    mapped = data.map(lambda row: {"words": len((row.get("json") or row)["caption"].split())})
    mapped.to_parquet(tmp_path / "again.parquet")
    again = load_dataset("parquet", data_files=str(tmp_path / "again.parquet"), split="train", cache_dir=cache)
    rows = [row["json"] if kind == "shards" else row for row in again]
    kept = [row for row in rows if row.get("outcome", Outcome.KEPT.value) == Outcome.KEPT.value]
    assert [row["caption"] for row in kept] == [s.caption for s in samples]
    assert again["words"][:8] == [2] * 8
    if kind in PARQUET:
        scores = [{name: value for name, value in row["scores"].items() if value is not None} for row in kept]
        assert scores == [dict(s.scores) for s in samples]
