"""A run learns, alone or in several processes, and shows what it learned; what goes wrong is said in one line."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from datapipe.schema import RLE, Slice
from datapipe.shards import write_shard
from datapipe.shards.store import LOCK_FILE, Store
from model import ModelError, SubjectDiffusionPipeline
from subject_diffusion.errors import RunError
from tests.documents import marked
from tests.toy import PROJECT
from tests.train.datasets import PROVENANCE, sample, write_dataset
from tests.train.training import check_learnt_the_same, learned, logged, training_recipe, write_training_recipe
from train.trainer.data import through_epochs
from train.trainer.guard import LossGuard
from train.trainer.launch import train
from train.trainer.logging import RunLogger
from train.trainer.loop import Trainer
from train.trainer.optimization import lr_factor, state_of
from train.trainer.recipe import OptimizerSettings, TrainRecipe


def test_a_run_leaves_a_pipeline_a_grid_and_a_log(undisturbed, sd1):
    pipeline = SubjectDiffusionPipeline.from_pretrained(undisturbed / "pipeline")
    DiffusionPipeline.from_pretrained(undisturbed / "pipeline", trust_remote_code=True)
    average = learned(undisturbed)
    for name, parameter in pipeline.subject_net.named_parameters():
        assert torch.equal(parameter, average[f"average/{name}"])
    sheet = np.asarray(Image.open(undisturbed / "validation-00000006.png").convert("L"))
    head = len(sheet) - (2 * 68 - 4)
    columns = [sheet[:head, left : left + 64] for left in range(0, sheet.shape[1], 68)]
    assert len(columns) >= 3
    assert all((column < 128).any() for column in columns), "each column has a heading"
    assert sorted(logged(undisturbed)) == [1, 2, 3, 4, 5, 6]
    assert all(0 < share < 100 for share in logged(undisturbed, "mfu").values())


@pytest.mark.parametrize("name", ["draw", "draw-one", "draw-two"])
def test_the_documents_lines_draw_with_it(undisturbed, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(PROJECT / "examples")
    exec(marked(name).code.replace("out/train-toy", str(undisturbed)))
    assert Image.open("drawn.png").size == (64, 64)


def test_weights_and_biases_is_told_what_tensorboard_is(tmp_path, sd1, clip, dataset, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = {"wandb_project": "toy"}
    assert train(training_recipe(sd1, clip, dataset, run=run, optimizer={"steps": 2}), tmp_path / "run")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (picture,) = (folder / "files" / "media" / "images").glob("validation_2_*.png")
    assert Image.open(picture).size == Image.open(tmp_path / "run" / "validation-00000002.png").size
    assert "loss/total" in capfd.readouterr().err  # the summary at the end
    identity = (tmp_path / "run" / "wandb-id").read_text()
    assert folder.name.endswith(f"-{identity}") and identity != "run"
    (told,) = folder.glob("*.wandb")
    assert b"attention_downsampling" in told.read_bytes(), "the recipe is the run's configuration"


def first_two(out: Path) -> dict[int, float]:
    return {step: loss for step, loss in logged(out).items() if step <= 2}


def test_a_line_of_the_log_is_the_mean_since_the_last_one(undisturbed, tmp_path, sd1, clip, dataset):
    assert train(training_recipe(sd1, clip, dataset, run={"log_every": 2}, optimizer={"steps": 3}), tmp_path / "run")
    each = logged(undisturbed)
    means = {2: (each[1] + each[2]) / 2, 3: each[3]}
    assert logged(tmp_path / "run") == pytest.approx(means)


def test_the_log_tells_images_with_subjects_and_each_phases_speed(undisturbed):
    assert set(logged(undisturbed, "images_with_subjects").values()) == {1.0}
    phases = [logged(undisturbed, f"images_per_s_alone/{name}") for name in ("encode", "learn", "update")]
    for step, speed in logged(undisturbed, "images_per_s").items():
        assert sum(1 / phase[step] for phase in phases) <= 1 / speed


def test_held_out_loss_is_logged_by_level_of_noise(tmp_path, sd1, clip, dataset, undisturbed):
    validation = {"path": str(write_dataset(tmp_path / "held-out", (7,), first_row=100)), "every": 1}
    assert train(training_recipe(sd1, clip, dataset, validation=validation, optimizer={"steps": 2}), tmp_path / "run")
    by_level = [logged(tmp_path / "run", f"held_out/loss_t{timestep}") for timestep in (125, 375, 625, 875)]
    assert all(sorted(losses) == [1, 2] and min(losses.values()) > 0 for losses in by_level)
    assert logged(tmp_path / "run") == first_two(undisturbed), "looking changes nothing that is learned"


def test_a_corrupt_sample_is_counted_and_named_in_the_log(tmp_path, sd1, clip, capfd):
    rows = [sample(row) for row in range(5)]
    rows[1] = rows[1].replace(candidates=(dataclasses.replace(rows[1].candidates[0], mask=RLE((1, 1), "")),))
    write_shard(Store(str(tmp_path / "dataset")), "shard", Slice(0, tuple(rows)), PROVENANCE)
    recipe = training_recipe(sd1, clip, tmp_path / "dataset", optimizer={"steps": 4})
    assert train(recipe, tmp_path / "run")
    said = capfd.readouterr().err
    named = re.findall(r"corrupt sample 0000000001 of \S+shard-000000.tar: .*another one is learned", said)
    assert len(named) == max(logged(tmp_path / "run", "replaced_samples").values()) >= 1


def test_a_dataset_without_any_subject_is_refused(tmp_path, sd1, clip, dataset):
    bare = tmp_path / "bare"
    write_shard(Store(str(bare)), "shard", Slice(0, tuple(sample(row, entities=0) for row in range(8))), PROVENANCE)
    with pytest.raises(RunError, match="bare: no image has a subject"):
        train(training_recipe(sd1, clip, bare), tmp_path / "run")
    both = [{"path": str(dataset)}, {"path": str(bare)}]
    recipe = training_recipe(sd1, clip, bare, sources=both, optimizer={"steps": 3}, run={"log_every": 3})
    assert train(recipe, tmp_path / "mixed")
    assert 0 < logged(tmp_path / "mixed", "images_with_subjects")[3] < 1


def test_two_processes_of_torchrun_learn_what_one_does(undisturbed, tmp_path, sd1, clip, dataset):
    recipe = write_training_recipe(tmp_path / "r.yaml", sd1, clip, dataset, run={"workers": 2, "micro_batch": 1})
    words = ["train", "--recipe", str(recipe), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sdd"]
    done = subprocess.run([*command, *words], cwd=PROJECT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pipeline: ") == 1
    assert [int(step) for step in re.findall(r"^step (\d+) ", done.stderr, re.MULTILINE)] == [1, 2, 3, 4, 5, 6]
    check_learnt_the_same(tmp_path / "run", undisturbed)


def test_torchrun_has_to_start_as_many_processes_as_the_recipe_says(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RunError, match=r"torchrun started 3 processes, and run\.workers is 1; set it to 3"):
        train(recipe, tmp_path / "run")


def _split(rank: int, folder: Path, recipes: dict[str, TrainRecipe]) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, recipe in recipes.items():
        trainer = Trainer(recipe, folder / name, torch.device("cpu"))
        trainer.run()
        net: Any = trainer.model.subject_net
        assert all(isinstance(block, FSDPModule) for block in (*net.blocks, *net.text_encoder.encoder.layers))
        here, everywhere = (sum(size(p) for p in trainer.named.values()) for size in (_elements_here, Tensor.numel))
        assert here < 0.6 * everywhere, "gathered weights are let go of again"
        again = Trainer(recipe, folder / name, torch.device("cpu"))
        assert again.step == recipe.optimizer.steps
        saved, found = _held(trainer), _held(again)
        assert saved.keys() == found.keys() and any(key.startswith("optimizer/") for key in found)
        assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
    distributed.destroy_process_group()


def _held(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's weights, average and moments, as bytes: float8 is not compared."""
    state = state_of(trainer.model.subject_net, trainer.named, trainer.average, trainer.optimizer)
    own = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in state.items()}
    return {name: t.flatten().view(torch.uint8) for name, t in own.items()}


def _elements_here(tensor: Tensor) -> int:
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


def test_two_processes_that_split_the_state_learn_what_one_does(undisturbed, tmp_path, sd1, clip, dataset):
    run = {"workers": 2, "micro_batch": 1, "strategy": "fsdp", "loader_workers": 0}
    narrow = run | {"precision": "bfloat16", "gradient_checkpointing": True}
    recipes = {
        "run": training_recipe(sd1, clip, dataset, run=run, optimizer={"steps": 2}),
        "narrow": training_recipe(sd1, clip, dataset, run=narrow, optimizer={"steps": 1, "moments": "float8"}),
    }
    spawn(_split, (tmp_path, recipes), nprocs=2)
    check_learnt_the_same(tmp_path / "run", undisturbed)
    assert logged(tmp_path / "narrow")[1] == pytest.approx(logged(undisturbed)[1], rel=0.1)
    kept = {name: t.dtype for name, t in learned(tmp_path / "narrow").items()}
    assert {dtype for name, dtype in kept.items() if not name.startswith("optimizer/")} == {torch.float32}
    # One process goes on with what two saved.
    assert train(training_recipe(sd1, clip, dataset, optimizer={"steps": 3}), tmp_path / "run")


def test_gradient_checkpointing_changes_nothing_but_rounding(undisturbed, tmp_path, sd1, clip, dataset):
    run = {"gradient_checkpointing": True}
    assert train(training_recipe(sd1, clip, dataset, run=run, optimizer={"steps": 2}), tmp_path / "run")
    assert logged(tmp_path / "run") == pytest.approx(first_two(undisturbed), rel=1e-4)


def test_bfloat16_trains(tmp_path, undisturbed, sd1, clip, dataset):
    recipe = training_recipe(sd1, clip, dataset, run={"precision": "bfloat16"}, optimizer={"steps": 2})
    assert train(recipe, tmp_path / "run")
    assert logged(tmp_path / "run") == pytest.approx(first_two(undisturbed), rel=0.1)
    assert {t.dtype for t in learned(tmp_path / "run").values()} == {torch.float32}


def test_a_loss_that_explodes_is_skipped_and_ends_the_run_in_one_line(tmp_path, sd1, clip, dataset):
    optimizer = {"lr": 1e30, "warmup_steps": 0, "most_skipped": 3, "steps": 100}
    with pytest.raises(RunError, match=r"3 times in a row; lower optimizer\.lr"):
        train(training_recipe(sd1, clip, dataset, optimizer=optimizer), tmp_path / "run")
    assert logged(tmp_path / "run", "optimizer/skipped")[3] == 2


def test_a_skipped_step_leaves_the_weights_as_they_were(recipe, tmp_path):
    trainer = Trainer(recipe, tmp_path, torch.device("cpu"))
    trainer.guard.mean_loss = 1e-9  # any loss explodes beside it
    before = {n: p.detach().clone() for n, p in trainer.named.items()}
    figures = trainer._update(through_epochs(trainer.loader), RunLogger(None, None, None))
    assert figures["optimizer/skipped"] == 1
    assert all(torch.equal(p, before[n]) for n, p in trainer.named.items())
    assert all(p.grad is None for p in trainer.named.values())


def test_a_total_below_zero_is_no_explosion(tmp_path, sd1, clip, dataset):
    """The balanced attention loss is a difference of two means: with a large weight it takes the total below zero."""
    recipe = training_recipe(
        sd1, clip, dataset, model={"attention_weight": 1e5}, optimizer={"most_skipped": 3, "steps": 8, "lr": 1e-4}
    )
    assert train(recipe, tmp_path / "run")
    assert min(logged(tmp_path / "run").values()) < 0
    assert set(logged(tmp_path / "run", "optimizer/skipped").values()) == {0}


def test_the_guard_judges_the_diffusion_loss_and_whatever_is_not_finite():
    guard = LossGuard(OptimizerSettings(steps=1, exploding=20, most_skipped=4))
    assert guard.allows(0, total=-5.0, diffusion=0.1, gradient_norm=1.0)
    assert guard.allows(1, total=30.0, diffusion=0.2, gradient_norm=1.0)
    assert not guard.allows(2, total=-5.0, diffusion=3.0, gradient_norm=1.0)
    assert not guard.allows(3, total=math.nan, diffusion=0.1, gradient_norm=1.0)
    assert not guard.allows(4, total=0.1, diffusion=0.1, gradient_norm=math.inf)
    assert guard.allows(5, total=0.1, diffusion=0.1, gradient_norm=1.0)
    assert (guard.skipped, guard.skipped_in_a_row) == (3, 0)


def test_two_runs_do_not_write_into_one_folder(recipe, tmp_path):
    with Store(str(tmp_path)).lock(), pytest.raises(RunError, match="another run is writing here"):
        train(recipe, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": []}, RunError, "no data to learn from"),
        ({"base": "nowhere"}, RunError, "base nowhere: no such folder"),
        ({"image_encoder": "nowhere"}, RunError, "image_encoder nowhere: no such folder"),
        ({"examples": {"size_px": 60}}, RunError, "examples.size_px 60: .* multiples of 8"),
        ({"examples": {"reference": {"background": "photo"}}}, RunError, "needs a folder of pictures"),
        ({"model": {"attention_downsampling": [16]}}, ModelError, "attention_downsampling"),
    ],
)
def test_a_mistake_is_named_before_any_training(sd1, clip, dataset, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(training_recipe(sd1, clip, dataset, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_filter_that_leaves_nothing_is_named(sd1, clip, dataset, tmp_path):
    for keep in ({"min_score": 0.99, "min_entities": 1}, {"tags": ["unicorn"]}):
        sources = [{"path": str(dataset), "keep": keep}]
        with pytest.raises(RunError, match="no entity is left after the filter"):
            train(training_recipe(sd1, clip, dataset, sources=sources), tmp_path / "run")


def test_another_dataset_is_read_with_the_recipes_filter(sdd, sd1, clip, dataset, tmp_path):
    sources = [{"path": "nowhere", "keep": {"tags": ["unicorn"]}}]
    path = write_training_recipe(tmp_path / "r.yaml", sd1, clip, dataset, sources=sources)
    code, _, error = sdd("train", "--recipe", path, "--data", dataset, "--out", tmp_path / "run")
    assert code == 2
    assert re.search(f"{dataset}: no entity is left after the filter", error.splitlines()[-1])


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        (
            "shard-000001.manifest.json",
            b'"schema_version": 2',
            b'"schema_version": 9',
            "schema version 9; this release reads 2",
        ),
        ("shard-000001.tar", b"a mug", b"a jug", r"shard-000001.tar.*SHA-256 is not the manifest's"),
        ("shard-000001.parquet", b"PAR1", b"PAR?", r"shard-000001.parquet.*damaged"),
    ],
)
def test_damaged_shards_are_one_line_and_exit_code_2(sdd, sd1, clip, dataset, tmp_path, file, before, after, message):
    damaged = Path(shutil.copytree(dataset, tmp_path / "damaged"))
    content = (damaged / file).read_bytes()
    assert before in content
    (damaged / file).write_bytes(content.replace(before, after))
    path = write_training_recipe(tmp_path / "r.yaml", sd1, clip, damaged)
    code, _, error = sdd("train", "--recipe", path, "--out", tmp_path / "run")
    assert code == 2
    assert re.search(message, error.splitlines()[-1])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_learning_rate_rises_and_falls():
    cosine = OptimizerSettings(steps=100, warmup_steps=10, schedule="cosine")
    rates = [lr_factor(step, cosine) for step in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5, abs=0.01)
    assert rates[99] < 0.001
    assert lr_factor(10**6, OptimizerSettings(steps=100)) == 1
