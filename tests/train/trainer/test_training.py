"""A run stopped anywhere goes on as if it had not; several processes learn what one does; what goes wrong is said in
one line."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from datapipe.schema import IDENTITIES, RLE, Slice
from datapipe.shards import write_shard
from datapipe.shards.store import LOCK_FILE, Store
from model import ModelError, SubjectDiffusionPipeline
from subject_diffusion.errors import RunError
from tests.documents import marked
from tests.toy import PROJECT
from tests.train.datasets import PROVENANCE, sample, write_dataset
from tests.train.training import training_recipe, write_training_recipe
from train.trainer.checkpoint import CheckpointError, checkpoints, load_checkpoint, read_record, save_checkpoint
from train.trainer.data import through_epochs
from train.trainer.guard import LossGuard
from train.trainer.launch import train
from train.trainer.logging import RunLogger
from train.trainer.loop import Trainer
from train.trainer.optimization import lr_factor
from train.trainer.recipe import OptimizerSettings, TrainRecipe
from train.trainer.run_storage import RunStorage


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"), (6, 5, 7))


@pytest.fixture(scope="module")
def recipe(sd1, clip, dataset) -> TrainRecipe:
    return training_recipe(sd1, clip, dataset)


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(recipe, out)
    return out


def learned(out: Path, checkpoint: int = -1) -> dict[str, Tensor]:
    """Everything in the newest checkpoint, or the one of that place, by file and name."""
    tensors, _ = load_checkpoint(checkpoints(out / "checkpoints")[checkpoint])
    return {f"{stem}/{name}": t for stem, named in tensors.items() for name, t in named.items()}


def logged(out: Path, name: str = "loss/total") -> dict[int, float]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_run_resumed_from_any_checkpoint_learns_bit_for_bit_what_one_that_never_stopped_does(
    recipe, undisturbed, tmp_path, step, loader_workers
):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out, ignore=shutil.ignore_patterns("tensorboard", "pipeline"))
    for path in checkpoints(out / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    workers = recipe.run.model_copy(update={"loader_workers": loader_workers})
    assert train(recipe.model_copy(update={"run": workers}), out)
    expected, found = learned(undisturbed), learned(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert logged(out) == {s: loss for s, loss in logged(undisturbed).items() if s > step}


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


def test_a_line_of_the_log_is_the_mean_since_the_last_one(undisturbed, tmp_path, sd1, clip, dataset):
    assert train(training_recipe(sd1, clip, dataset, run={"log_every": 4}), tmp_path / "run")
    each = logged(undisturbed)
    means = {4: sum(each[step] for step in range(1, 5)) / 4, 6: (each[5] + each[6]) / 2}
    assert logged(tmp_path / "run") == pytest.approx(means)


def test_the_log_tells_images_with_subjects_and_each_phases_speed(undisturbed):
    assert set(logged(undisturbed, "images_with_subjects").values()) == {1.0}
    phases = [logged(undisturbed, f"images_per_s_alone/{name}") for name in ("encode", "learn", "update")]
    for step, speed in logged(undisturbed, "images_per_s").items():
        assert sum(1 / phase[step] for phase in phases) <= 1 / speed


def test_held_out_loss_is_logged_by_level_of_noise(tmp_path, sd1, clip, dataset, undisturbed):
    validation = {"path": str(write_dataset(tmp_path / "held-out", (7,), first_row=100)), "every": 3}
    assert train(training_recipe(sd1, clip, dataset, validation=validation), tmp_path / "run")
    by_level = [logged(tmp_path / "run", f"held_out/loss_t{timestep}") for timestep in (125, 375, 625, 875)]
    assert all(sorted(losses) == [3, 6] and min(losses.values()) > 0 for losses in by_level)
    assert logged(tmp_path / "run") == logged(undisturbed), "looking changes nothing that is learned"


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


def test_a_finished_run_has_nothing_left_to_do(recipe, undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    before = learned(out)
    assert train(recipe, out)
    assert all(torch.equal(before[n], t) for n, t in learned(out).items())


def check_learnt_the_same(out: Path, undisturbed: Path) -> None:
    """But for rounding, which Adam makes large where a gradient is nearly zero, and more so with every step."""
    expected, found = learned(undisturbed, 0), learned(out, 0)
    assert expected.keys() == found.keys()
    for name in expected:

        def with_name(said: str, name: str = name) -> str:
            return f"{name}: {said}"

        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=5e-4, msg=with_name)
    assert logged(out) == pytest.approx(logged(undisturbed), rel=1e-3)


def test_two_processes_of_ray_train_learn_what_one_does(undisturbed, tmp_path, sd1, clip, dataset, monkeypatch, capfd):
    # Each gets a part of the same batches, so only the order of additions differs. Paths are relative, as users' are.
    monkeypatch.chdir(tmp_path)
    base, encoder, data = (Path(os.path.relpath(path)) for path in (sd1, clip, dataset))
    assert train(training_recipe(base, encoder, data, run={"workers": 2, "micro_batch": 1}), Path("run"))
    said = capfd.readouterr().err
    assert [int(step) for step in re.findall(r"^step (\d+) ", said, re.MULTILINE)] == [1, 2, 3, 4, 5, 6]
    check_learnt_the_same(tmp_path / "run", undisturbed)


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


def _split(rank: int, recipe: TrainRecipe, out: Path) -> None:
    distributed.init_process_group("gloo", f"file://{out}.rendezvous", rank=rank, world_size=2)
    Trainer(recipe, out, torch.device("cpu")).run()
    distributed.destroy_process_group()


def test_two_processes_that_split_the_state_learn_what_one_does(undisturbed, tmp_path, sd1, clip, dataset):
    run = {"workers": 2, "micro_batch": 1, "strategy": "fsdp", "loader_workers": 0}
    recipe = training_recipe(sd1, clip, dataset, run=run)
    spawn(_split, (recipe, tmp_path / "run"), nprocs=2)
    check_learnt_the_same(tmp_path / "run", undisturbed)
    # One process goes on with what two saved.
    assert train(training_recipe(sd1, clip, dataset, optimizer={"steps": 7}), tmp_path / "run")


def test_gradient_checkpointing_changes_nothing_but_rounding(undisturbed, tmp_path, sd1, clip, dataset):
    run = {"gradient_checkpointing": True}
    assert train(training_recipe(sd1, clip, dataset, run=run), tmp_path / "run")
    assert logged(tmp_path / "run") == pytest.approx(logged(undisturbed), rel=1e-4)


def test_bfloat16_trains(tmp_path, undisturbed, sd1, clip, dataset):
    assert train(training_recipe(sd1, clip, dataset, run={"precision": "bfloat16"}), tmp_path / "run")
    assert logged(tmp_path / "run") == pytest.approx(logged(undisturbed), rel=0.1)
    assert {t.dtype for t in learned(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_saves_and_the_same_command_goes_on(undisturbed, tmp_path, sd1, clip, dataset, workers):
    run = {"checkpoint_every": 1000, "loader_workers": 1, "workers": workers, "micro_batch": 1}
    path = write_training_recipe(tmp_path / "r.yaml", sd1, clip, dataset, run=run, optimizer={"steps": 100_000})
    command = [sys.executable, "-m", "sdd", "train", "--recipe", str(path), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, cwd=PROJECT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 3 "):
            if workers == 1:
                os.killpg(process.pid, signal.SIGTERM)  # as some schedulers do, to the loader's workers too
            else:
                process.terminate()
            break
    _, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    assert error.endswith("sdd: stopped; the same command goes on from here\n")
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    if workers > 1:
        return  # how these go on is tested above
    done = subprocess.run(
        [*command, "--set", f"optimizer.steps={step + 2}"], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [int(s) for s in re.findall(r"^step (\d+) ", done.stderr, re.MULTILINE)] == [step + 1, step + 2]


@pytest.mark.parametrize("what", ["half", "gone", "changed"])
def test_a_checkpoint_that_is_not_whole_is_named_and_never_used(recipe, undisturbed, tmp_path, what):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    newest = checkpoints(out / "checkpoints")[-1] / "weights.safetensors"
    if what == "half":
        os.truncate(newest, newest.stat().st_size // 2)
    elif what == "gone":
        newest.unlink()
    else:
        content = bytearray(newest.read_bytes())
        content[-1] ^= 1
        newest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights.safetensors.*remove .*step-00000006 to go on"):
        train(recipe, out)


def test_what_a_killed_run_left_half_written_is_no_checkpoint(recipe, undisturbed, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(undisturbed / "checkpoints" / "step-00000002", folder / "step-00000002")
    shutil.copytree(undisturbed / "checkpoints" / "step-00000004", folder / ".partial-step-00000004")
    (folder / ".partial-step-00000004" / "checkpoint.json").unlink()
    assert Trainer(recipe, tmp_path / "run", torch.device("cpu")).step == 2
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


class Watched:
    """A display that tells when a step is done."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, threading.Event()

    def advance_to(self, step: int) -> None:
        if step >= self.step:
            self.done.set()

    def line(self, text: str) -> None:
        pass


def test_a_checkpoint_is_written_while_the_training_goes_on(recipe, undisturbed, tmp_path, monkeypatch):
    display, went_on = Watched(step=3), []

    def slow(folder: Path, step: int, *what: Any) -> Path:
        if step == 2:
            went_on.append(display.done.wait(120))
        return save_checkpoint(folder, step, *what)

    monkeypatch.setattr("train.trainer.checkpoint_writer.save_checkpoint", slow)
    assert Trainer(recipe, tmp_path / "run", torch.device("cpu")).run(display)
    assert went_on == [True]
    for place in (0, 1):  # what was saved is what was learned by then
        expected, found = learned(undisturbed, place), learned(tmp_path / "run", place)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(recipe, tmp_path, monkeypatch):
    def full(*what: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.trainer.checkpoint_writer.save_checkpoint", full)
    with pytest.raises(RunError, match=r"no checkpoint could be written .*No space left on device"):
        train(recipe, tmp_path / "run")


def test_only_the_newest_checkpoints_are_kept(tmp_path, sd1, clip, dataset):
    assert train(training_recipe(sd1, clip, dataset, run={"keep_checkpoints": 2}), tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000004", "step-00000006"]


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


def test_another_recipes_folder_is_refused_by_the_setting_that_differs(undisturbed, sd1, clip, dataset):
    with pytest.raises(RunError, match=r"another model.attention_weight: 0.01, now 0.5, .*init_from="):
        train(training_recipe(sd1, clip, dataset, model={"attention_weight": 0.5}), undisturbed)
    with pytest.raises(RunError, match=r"another optimizer.ema: 'an average', now 'none'"):
        train(training_recipe(sd1, clip, dataset, optimizer={"ema": 0}), undisturbed)


def test_rate_batch_clipping_and_steps_may_change_and_the_change_is_said_and_recorded(
    undisturbed, tmp_path, sd1, clip, dataset, capfd
):
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    changes = {"lr": 5e-4, "batch_size": 8, "clip_norm": 0.5, "steps": 7}
    assert train(training_recipe(sd1, clip, dataset, optimizer=changes), out)
    said = capfd.readouterr().err
    assert "from step 6 on, optimizer.lr 0.001 -> 0.0005" in said
    assert "from step 6 on, optimizer.batch_size 4 -> 8" in said
    (recorded,) = read_record(checkpoints(out / "checkpoints")[-1])["changes"]
    assert recorded == {
        "step": 6,
        "optimizer.lr": [1e-3, 5e-4],
        "optimizer.batch_size": [4, 8],
        "optimizer.clip_norm": [1.0, 0.5],
        "optimizer.steps": [6, 7],
    }


def test_moved_folders_are_the_same_run_bit_for_bit(undisturbed, tmp_path, sd1, clip, dataset, capfd):
    out = Path(shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("step-*6", "pipeline")))
    moved = [Path(shutil.copytree(folder, tmp_path / f"moved{n}")) for n, folder in enumerate((sd1, clip, dataset))]
    assert train(training_recipe(*moved), out)
    assert f"from step 4 on, base '{sd1}' -> '{moved[0]}'" in capfd.readouterr().err
    expected, found = learned(undisturbed), learned(out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_source_may_come_and_none_may_go_or_change(undisturbed, tmp_path, sd1, clip, dataset, capfd):
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    other = write_dataset(tmp_path / "other", (9,), first_row=50)
    with pytest.raises(RunError, match=f"{dataset}: what the run learned from is no longer among its sources"):
        train(training_recipe(sd1, clip, other), out)
    both = [{"path": str(dataset)}, {"path": str(other)}]
    before = read_record(checkpoints(out / "checkpoints")[-1])["stream"]
    assert train(training_recipe(sd1, clip, dataset, sources=both, optimizer={"steps": 7}), out)
    assert f"on, sources ['{dataset}'] -> ['{dataset}', '{other}']" in capfd.readouterr().err
    after = read_record(checkpoints(out / "checkpoints")[-1])["stream"]
    assert (after["epoch"], after["index"]) == (before["epoch"] + 1, 4)
    more = [{"path": str(dataset), "epochs": 2}, {"path": str(other)}]
    news = Trainer(training_recipe(sd1, clip, dataset, sources=more), out, torch.device("cpu")).news
    assert "from step 7 on, another mixture of the sources: a new epoch begins" in news
    assert f"on, sources ['{dataset}', '{other}'] -> ['{dataset} (2 epochs)', '{other}']" in "".join(news)


def test_another_base_is_refused(undisturbed, tmp_path, sd2, clip, dataset):
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    with pytest.raises(RunError, match="learned on another base or image encoder than"):
        train(training_recipe(sd2, clip, dataset), out)


@pytest.mark.parametrize("what", [".", "checkpoints/step-00000006", "pipeline"])
def test_a_run_starts_from_what_another_has_learned_with_a_fresh_optimizer(recipe, undisturbed, tmp_path, what):
    start = recipe.model_copy(update={"init_from": str(undisturbed / what)})
    trainer = Trainer(start, tmp_path / "run", torch.device("cpu"))
    averaged = learned(undisturbed)
    for name, parameter in trainer.named.items():
        assert torch.equal(parameter, averaged[f"average/{name}"])
        assert torch.equal(trainer.average.weights[name], parameter)
    assert trainer.step == 0 and not trainer.optimizer.state


def test_a_start_that_does_not_fit_is_one_line(undisturbed, tmp_path, sd1, clip, dataset):
    recipe = training_recipe(sd1, clip, dataset, init_from=str(undisturbed), model={"box_embedding": False})
    with pytest.raises(ModelError, match=r"init_from: .* subject_tokens.* is \(.*\), and \(.*\) is needed"):
        train(recipe, tmp_path / "run")
    with pytest.raises(RunError, match="nowhere: no training run"):
        train(training_recipe(sd1, clip, dataset, init_from="nowhere"), tmp_path / "run")


def test_two_runs_do_not_write_into_one_folder(recipe, tmp_path):
    with Store(str(tmp_path)).lock(), pytest.raises(RunError, match="another run is writing here"):
        train(recipe, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE}


def test_other_identities_than_were_learnt_from_are_refused(tmp_path, sd1, clip, dataset):
    folder = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    recipe = training_recipe(sd1, clip, folder, optimizer={"steps": 2})
    assert train(recipe, tmp_path / "run")
    same = {"key": [f"{row:010d}" for row in (0, 1)], "entity": [0, 0], "identity": ["mug", "mug"]}
    pq.write_table(pa.table(same), folder / IDENTITIES)
    with pytest.raises(RunError, match=f"dataset: was learned with other identities: {IDENTITIES} has changed"):
        train(recipe, tmp_path / "run")


def test_a_run_in_a_bucket_goes_on_there_from_a_machine_that_has_nothing_of_it(
    undisturbed, tmp_path, sd1, clip, dataset, bucket, monkeypatch
):
    recipe, out = training_recipe(sd1, clip, dataset, run={"keep_checkpoints": 1}), f"{bucket}/training"
    monkeypatch.setattr("train.trainer.run_storage._COPIES", tmp_path / "first")
    shutil.copytree(undisturbed / "checkpoints" / "step-00000002", tmp_path / "saved" / "step-00000002")
    first = RunStorage(out)
    shutil.copytree(tmp_path / "saved", first.local / "checkpoints")
    first.publish(first.local / "checkpoints")
    first.store.put("recipe.json", recipe.model_dump_json().encode())
    monkeypatch.setattr("train.trainer.run_storage._COPIES", tmp_path / "second")
    assert train(recipe, out)
    second = RunStorage(out)
    assert second.checkpoints() == ["step-00000006"], "older ones are gone from the bucket, too"
    found, expected = learned(second.local), learned(undisturbed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("pipeline/model_index.json", "validation-00000006.png", "tensorboard"):
        assert second.store.exists(name), name
    with pytest.raises(RunError, match="training holds a run with another seed: 0, now 1"):
        train(training_recipe(sd1, clip, dataset, seed=1), out)


def _apart(rank: int, recipe: TrainRecipe, folders: list[Path], says: Path) -> None:
    """Two processes whose folders are not the same; one after the other begins with that of the other."""
    distributed.init_process_group("gloo", f"file://{says}.rendezvous", rank=rank, world_size=2)
    trainer = Trainer(recipe, folders[rank], torch.device("cpu"))
    expected, _ = load_checkpoint(checkpoints(folders[0] / "checkpoints")[-1])
    assert trainer.step == 4
    for name, parameter in trainer.named.items():
        assert torch.equal(parameter, expected["weights"][name])
        assert torch.equal(trainer.optimizer.state[parameter]["exp_avg"], expected["optimizer"][f"{name}.exp_avg"])
    try:
        Trainer(recipe, folders[1 - rank], torch.device("cpu"))
    except RunError as error:
        Path(f"{says}-{rank}").write_text(str(error))
    distributed.destroy_process_group()


def test_the_first_rank_chooses_for_all_and_is_refused_where_another_is_further(
    undisturbed, tmp_path, sd1, clip, dataset
):
    behind = shutil.ignore_patterns("step-*6", "pipeline", "tensorboard")
    shutil.copytree(undisturbed, tmp_path / "has", ignore=behind)
    recipe = training_recipe(sd1, clip, dataset, run={"workers": 2, "micro_batch": 1})
    spawn(_apart, (recipe, [tmp_path / "has", tmp_path / "has-not"], tmp_path / "says"), nprocs=2)
    for rank, folder in enumerate(("has-not", "has")):
        said = (tmp_path / f"says-{rank}").read_text()
        assert f"{folder}: another node has step-00000004 there" in said and "no checkpoint; name a folder" in said


def test_more_steps_and_another_number_of_processes_are_the_same_run(recipe, sd1, clip, dataset):
    same = training_recipe(sd1, clip, dataset, optimizer={"steps": 60}, run={"workers": 2, "micro_batch": 1})
    assert same.identity() == recipe.identity()
    assert training_recipe(sd1, clip, dataset, examples={"size_px": 32}).identity() != recipe.identity()


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
