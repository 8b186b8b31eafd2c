"""What lies in a run's folder is found by name."""

from __future__ import annotations

from pathlib import Path

from train.trainer.run_folder import results_folder


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
