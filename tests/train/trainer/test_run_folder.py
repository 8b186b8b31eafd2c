"""What lies in a run's folder is found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from subject_diffusion.errors import RunError
from train.trainer.run_folder import checkpoint_of, results_folder, trained_model


def test_a_model_in_a_bucket_is_to_be_copied_first():
    said = "s3://bucket/run: a model is read from a local folder; copy it"
    with pytest.raises(RunError, match=said):
        trained_model(Path("s3://bucket/run"))
    with pytest.raises(RunError, match=said):
        checkpoint_of(Path("s3://bucket/run"), 1)


def test_results_of_different_models_lie_in_different_folders(tmp_path, monkeypatch):
    for run in ("a", "b"):
        (tmp_path / run / "pipeline").mkdir(parents=True)
        (tmp_path / run / "checkpoints/step-00000001").mkdir(parents=True)
    assert results_folder(tmp_path / "a") == tmp_path / "a"
    assert results_folder(tmp_path / "a/pipeline") == Path("out/a-pipeline")
    assert results_folder(tmp_path / "b/pipeline") == Path("out/b-pipeline")
    assert results_folder(tmp_path / "b/checkpoints/step-00000001") == Path("out/b-step-00000001")
    assert results_folder(Path("owner/name")) == Path("out/owner-name"), "of the hub"
    monkeypatch.chdir(tmp_path / "a")
    assert results_folder(Path("pipeline")) == Path("out/a-pipeline")
