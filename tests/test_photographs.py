"""Photographs of the real world, as an engineer would run them: a folder of images through `sdd dataset`."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from datapipe.inspect import summarize
from datapipe.schema import Outcome, from_table
from datapipe.shards import Store, iter_tables, kept_samples
from tests.toy import PROJECT, TOY_RECIPE, run

PHOTOGRAPHS = Path(os.environ.get("SDD_DREAMBENCH", PROJECT.parent / "shared/data/dreambench"))


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="no DreamBooth dataset; SDD_DREAMBENCH names its folder")
def test_every_photograph_of_a_folder_is_decoded_labeled_and_accounted_for(tmp_path, sdd):
    folder = tmp_path / "photographs"
    for photograph in [p for subject in PHOTOGRAPHS.iterdir() for p in sorted(subject.glob("*.jpg"))[:1]]:
        copy = folder / photograph.relative_to(PHOTOGRAPHS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photograph, copy)
    done = run(TOY_RECIPE, folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "the toy models know the 32 nouns of the drawn toy world" in done.stdout
    store = Store(str(tmp_path / "out"))
    files = {hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.jpg")}
    samples = [sample for table in iter_tables(store) for sample in from_table(table)]
    assert len(samples) == len(files) == 30
    assert not any(outcome is Outcome.FAILED for _, _, outcome in summarize(store).losses)
    assert all(s.verdict for s in samples) and {s.sha256 for s in samples} == files
    for sample in kept_samples(store):
        assert hashlib.sha256(sample.image or b"").hexdigest() in files, "stored as it was"
        assert sample.caption and sample.entities
    assert sdd("verify", tmp_path / "out")[0] == 0
    assert sdd("report", tmp_path / "out", "--save", tmp_path / "report.html")[0] == 0
