"""Runs that are compared are trained and asked the same; signs are told only where they are clear."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import sdd
from tests.toy import PROJECT
from tests.train.datasets import write_dataset
from tests.train.training import write_training_recipe
from toyworld.pretrain import subject
from train.evaluation.ablate import (
    FULL,
    PAPERS_COLUMN,
    SUBJECTS,
    VARIANTS,
    Comparison,
    VariantScore,
    compare,
    mean_over_seeds_and_images,
)
from train.evaluation.report import Report
from train.sampling import trained
from train.trainer.checkpoint import checkpoints
from train.trainer.pipeline import read_recipe
from train.trainer.run_folder import is_net


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def recipe(sd1: Path, clip: Path, folder: Path) -> Path:
    dataset = write_dataset(folder / "dataset", (9, 9), caption="a mug, a fish and a robot")
    changes = {"optimizer": {"steps": 1, "warmup_steps": 0}, "validation": {"images": 1, "num_inference_steps": 1}}
    return write_training_recipe(folder / "recipe.yaml", sd1, clip, dataset, **changes)


def ablate(recipe: Path, folder: Path, *more: str | Path) -> tuple[int, str, str]:
    data, out = folder / "dataset", folder / "runs"
    return sdd("ablate", "--recipe", recipe, "--data", data, "--out", out, "--seeds", "1", *more, columns=200)


@pytest.fixture(scope="module")
def done(recipe: Path, folder: Path) -> Path:
    code, _, error = ablate(recipe, folder, "--images", "2")
    assert code == 0, error
    assert "no location mask, seed 0: scored" in error
    return folder / "runs"


def report(run: Path, evaluation: str = "evaluation-2") -> dict[str, Any]:
    written: dict[str, Any] = json.loads((run / evaluation / "report.json").read_text())
    return written


def test_each_variant_is_trained_without_its_part_and_scored(done):
    runs = [path for path in done.iterdir() if path.is_dir()]
    assert len(runs) == len(VARIANTS)
    assert not read_recipe(done / "no-location-mask-0").model.location_mask
    assert read_recipe(done / "no-adapter-0").model.location_mask
    for run in runs:
        for subjects in SUBJECTS:
            written = report(run, f"evaluation-{subjects}")
            assert (written["asked"]["images"], written["asked"]["subjects"]) == (2, subjects)
            assert len(written["groups"]["all"]["per_image"]["subject"]["clip"]) == 2


def test_the_comparison_of_all_runs_lies_beside_them(done):
    written = json.loads((done / "report.json").read_text())
    assert written["seeds"] == [0]
    cells = written["cells"]
    assert len(cells) == len(VARIANTS) * len(PAPERS_COLUMN) * len(SUBJECTS)
    of = {(c["variant"], c["subjects"], c["metric"]): c for c in cells}
    scores = report(done / "no-adapter-0")["groups"]["all"]["per_image"]["subject"]["clip"]
    assert of["no adapter", 2, "clip"]["value"]["mean"] == pytest.approx(np.mean(scores))
    assert Comparison.from_json(written).to_json() == written
    assert of["no adapter", 2, "clip"]["papers_gain"] == pytest.approx(0.649 - 0.696)


def test_run_again_it_trains_nothing_and_asks_only_what_it_was_not_asked(done, recipe, folder):
    written = done / "full-0" / "evaluation-1" / "report.json"
    learned, asked = checkpoints(done / "full-0" / "checkpoints")[-1].stat().st_mtime_ns, written.stat().st_mtime_ns
    assert ablate(recipe, folder, "--images", "2")[0] == 0
    assert written.stat().st_mtime_ns == asked
    code, _, error = ablate(recipe, folder, "--images", "3", "--set", "validation.num_inference_steps=2")
    assert code == 0, error
    assert report(done / "full-0")["groups"]["all"]["images"] == 3
    assert report(done / "full-0")["drawn"]["num_inference_steps"] == 2
    assert checkpoints(done / "full-0" / "checkpoints")[-1].stat().st_mtime_ns == learned


def test_another_recipe_or_too_few_images_are_refused_before_any_training(done, recipe, folder, tmp_path):
    code, _, error = ablate(recipe, folder, "--images", "2", "--set", "optimizer.lr=0.5")
    assert code == 2
    assert "holds a run with another optimizer.lr" in error
    few = ("--data", folder / "dataset", "--out", tmp_path / "new", "--images", "99")
    code, _, error = sdd("ablate", "--recipe", recipe, *few)
    assert code == 2
    assert "99 are needed" in error
    assert not (tmp_path / "new").exists()


def test_a_run_is_evaluated_beside_others_and_true_images(done, tmp_path, monkeypatch):
    asked = ("--data", done.parent / "dataset", "--cases", "2", "--tag", "mug")
    code, said, error = sdd("evaluate", done / "full-0", *asked, columns=200)
    assert code == 0, error
    written = report(done / "full-0", "evaluation")
    assert written["asked"]["tags"] == ["mug"]
    assert list(written["groups"]["all"]["means"]) == ["subject", "shuffled", "base", "true"]
    assert "subject over shuffled" in said
    assert "interpolation, largest step over mean step" in said
    beyond = json.loads((done / "full-0/evaluation/beyond.json").read_text())
    assert len(beyond["curve"]) == 9 and beyond["confused"] == {}, "no image of the dataset has two mugs"
    assert 1 <= beyond["leap"]["mean"] <= 8 and 0 <= beyond["kept"]["mean"] <= 1
    assert Report.from_json(written).to_json() == written
    assert "bundled" not in said, "its own report is on other images"

    monkeypatch.setattr(trained, "SHIPPED", str(tmp_path))
    shutil.copy(done / "full-0/evaluation/report.json", tmp_path)
    for steps, goes_on in ((40, True), (1, False)):
        (tmp_path / "scores.json").write_text(json.dumps({"steps": steps}))
        _, said, _ = sdd("evaluate", done / "full-0", *asked, columns=200)
        assert "the bundled toy model" in said
        assert ("for 40 steps, this one for 1; to go on: `make train SET=optimizer.steps=40`" in said) == goes_on


def test_a_run_is_packed_with_the_scores_of_its_reports(done, tmp_path):
    subject.main(["--run", str(done / "full-0"), "--steps", "9", "--minutes", "2", "--out", str(tmp_path)])
    reports = [word for n in SUBJECTS for word in ("--report", str(done / f"full-0/evaluation-{n}"))]
    subject.main([*reports, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "scores.json").read_text())
    assert (record["steps"], record["wall_clock_s"]) == (9, 120)
    assert "--set optimizer.steps=1" in record["command"]
    assert {record["scores"][f"images, {n} subject(s)"] for n in SUBJECTS} == {
        report(done / "full-0")["asked"]["images"]
    }
    assert (tmp_path / "report.json").read_bytes() == (done / "full-0/evaluation-1/report.json").read_bytes()
    assert is_net(tmp_path)


def test_a_sweep_scores_every_combination_and_tells_which_exploded(recipe, folder):
    over = (
        "--over",
        "optimizer.lr=[1e-3,1e30]",
        "--over",
        "run.micro_batch=[1,2]",
        "--set",
        "optimizer.most_skipped=1",
    )
    asked = ("--recipe", recipe, "--data", folder / "dataset", "--images", "2", "--set", "optimizer.steps=3")
    code, said, error = sdd("sweep", *over, *asked, "--out", folder / "sweep", columns=200)
    assert code == 0, error
    found = json.loads((folder / "sweep" / "report.json").read_text())["combinations"]
    assert [c["settings"] for c in found] == [
        [f"optimizer.lr={lr}", f"run.micro_batch={images}"] for lr in ("1e-3", "1e30") for images in (1, 2)
    ]
    assert all(-1 <= c["scores"]["clip"]["mean"] <= 1 and not c["why"] for c in found[:2])
    assert all(not c["scores"] and "lower optimizer.lr" in c["why"] for c in found[2:]), found
    assert {path.name for path in (folder / "sweep").iterdir() if path.is_dir()} == {
        ",".join(c["settings"]) for c in found
    }
    assert said.count("failed") == 2 and error.count("lower optimizer.lr") == 2


@pytest.mark.parametrize("over", ["optimizer.lr", "optimizer.lr=1e-4", "optimizer.lr=[", "optimizer.lr=[]"])
def test_values_to_sweep_over_that_are_no_list_are_refused(over, tmp_path):
    code, _, error = sdd("sweep", "--over", over, "--out", tmp_path / "new")
    assert (code, error.count("\n")) == (2, 1)
    assert "wanted a setting and a list of values" in error


@pytest.mark.parametrize("key", ["examples.size_px", "run.threads"])
def test_runs_that_cannot_be_compared_are_refused_before_any_training(recipe, folder, tmp_path, key):
    asked = ("--recipe", recipe, "--data", folder / "dataset", "--images", "2", "--out", tmp_path / "new")
    code, _, error = sdd("sweep", "--over", f"{key}=[64,128]", *asked)
    assert (code, error.count("\n")) == (2, 1)
    assert f"{key} has to be the same in all runs" in error
    assert not (tmp_path / "new").exists()


def test_sigterm_saves_the_runs_under_way_and_begins_no_other(recipe, folder):
    out = folder / "stopped"
    words = ["sweep", "--recipe", recipe, "--data", folder / "dataset", "--images", "2", "--out", out]
    words += ["--over", "optimizer.lr=[1e-3,2e-3,3e-3]", "--set", "run.threads=1", "--set", "run.checkpoint_every=1000"]
    command = [sys.executable, "-m", "sdd", *map(str, words), "--set", "optimizer.steps=100000"]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(out.glob("*/tensorboard/*")):
        time.sleep(0.2)
    process.terminate()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert error.endswith("sdd: stopped; the same command goes on from here\n")
    begun = [log.parent for log in out.glob("*/tensorboard")]
    assert begun and all(len(checkpoints(run / "checkpoints")) == 1 for run in begun)


def test_an_interval_is_as_wide_as_seeds_differ():
    rng = np.random.default_rng(0)
    alike, apart = (rng.normal(means, 0.1, (2, 50)) for means in ([[0.5], [0.5]], [[0.2], [0.8]]))
    assert mean_over_seeds_and_images(alike).high - mean_over_seeds_and_images(alike).low < 0.1
    assert mean_over_seeds_and_images(apart).low < 0.25
    assert mean_over_seeds_and_images(apart).high > 0.75


def test_a_sign_is_the_papers_the_opposite_or_unclear():
    rng = np.random.default_rng(0)
    full = rng.normal(0.5, 0.1, 40)
    change = {FULL: 0.0, "no image CLS": -0.1, "no adapter": 0.1}  # the paper: both lower the CLIP score
    scores = []
    for variant in VARIANTS:
        for seed in range(2):
            values = full + change.get(variant, 0.0) + rng.normal(0, 0.05, 40) * (variant != FULL)
            scores += [VariantScore(variant, seed, n, dict.fromkeys(PAPERS_COLUMN, values.tolist())) for n in SUBJECTS]
    found = {(c.variant, c.subjects): c for c in compare(scores) if c.metric == "clip"}
    assert found["no image CLS", 1].verdict == "as the paper"
    assert found["no adapter", 2].verdict == "opposite"
    assert found["no location mask", 1].verdict == "unclear"
    assert found["no image CLS", 1].gain.mean == pytest.approx(-0.1, abs=0.03)
    distances = {(c.variant, c.subjects): c for c in compare(scores) if c.metric == "pattern"}
    assert distances["no image CLS", 1].gain.mean == pytest.approx(0.1, abs=0.03)
