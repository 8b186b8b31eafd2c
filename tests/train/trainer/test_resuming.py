"""A run stopped anywhere goes on as if it had not; what may change then does, and what must not is refused."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DConditionModel

from datapipe.schema import IDENTITIES
from model import ModelError
from subject_diffusion.errors import RunError
from tests.toy import PROJECT
from tests.train.datasets import write_dataset
from tests.train.training import learned, logged, training_recipe, write_training_recipe
from train.trainer.checkpoint import checkpoints, read_record
from train.trainer.launch import train
from train.trainer.loop import Trainer
from train.trainer.run_storage import RunStorage


@pytest.mark.parametrize(("step", "loader_workers"), [(2, 2), (4, 0)])
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


def test_a_finished_run_has_nothing_left_to_do(recipe, undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    before = learned(out)
    assert train(recipe, out)
    assert all(torch.equal(before[n], t) for n, t in learned(out).items())


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_saves_and_the_same_command_goes_on(undisturbed, tmp_path, sd1, clip, dataset, workers):
    run = {"checkpoint_every": 1000, "loader_workers": 1, "workers": workers, "micro_batch": 1}
    places = (Path(os.path.relpath(path, PROJECT)) for path in (sd1, clip, dataset))  # relative, as users' are
    path = write_training_recipe(tmp_path / "r.yaml", *places, run=run, optimizer={"steps": 100_000})
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
    losses, others = logged(tmp_path / "run"), logged(undisturbed)
    # Processes of Ray Train each get a part of the same batches, so that only the order of additions differs.
    assert len(losses) >= 3
    assert losses == pytest.approx({k: others.get(k, losses[k]) for k in losses}, rel=1e-3)
    if workers > 1:
        return  # how these go on is tested above
    done = subprocess.run(
        [*command, "--set", f"optimizer.steps={step + 2}"], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [int(s) for s in re.findall(r"^step (\d+) ", done.stderr, re.MULTILINE)] == [step + 1, step + 2]


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
    assert "from step 7 on, samples come in another order: a new epoch begins" in news
    assert f"on, sources ['{dataset}', '{other}'] -> ['{dataset} (2 epochs)', '{other}']" in "".join(news)


def test_another_base_is_refused(undisturbed, tmp_path, sd2, clip, dataset):
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    with pytest.raises(RunError, match="learned on another base or image encoder than"):
        train(training_recipe(sd2, clip, dataset), out)


def test_other_identities_than_were_learnt_from_are_refused(tmp_path, sd1, clip, dataset):
    folder = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    recipe = training_recipe(sd1, clip, folder, optimizer={"steps": 2})
    assert train(recipe, tmp_path / "run")
    same = {"key": [f"{row:010d}" for row in (0, 1)], "entity": [0, 0], "identity": ["mug", "mug"]}
    pq.write_table(pa.table(same), folder / IDENTITIES)
    with pytest.raises(RunError, match=f"dataset: was learned with other identities: {IDENTITIES} has changed"):
        train(recipe, tmp_path / "run")


def test_more_steps_and_another_number_of_processes_are_the_same_run(recipe, sd1, clip, dataset):
    same = training_recipe(sd1, clip, dataset, optimizer={"steps": 60}, run={"workers": 2, "micro_batch": 1})
    assert same.identity() == recipe.identity()
    assert training_recipe(sd1, clip, dataset, examples={"size_px": 32}).identity() != recipe.identity()


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


@pytest.mark.parametrize("what", ["checkpoints/step-00000006", "pipeline"])
def test_a_start_from_what_another_base_has_learned_is_refused(recipe, undisturbed, tmp_path, sd1, what):
    other = Path(shutil.copytree(sd1, tmp_path / "sd1"))
    unet = UNet2DConditionModel.from_pretrained(other / "unet")
    torch.nn.init.constant_(unet.conv_in.weight, 0.5)
    unet.save_pretrained(other / "unet")
    start = recipe.model_copy(update={"base": str(other), "init_from": str(undisturbed / what)})
    with pytest.raises(RunError, match=f"init_from .*{what}: it was trained on another base"):
        Trainer(start, tmp_path / "run", torch.device("cpu"))


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
