"""A checkpoint is whole or not there, and is written while the training goes on."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from subject_diffusion.errors import RunError
from tests.train.training import learned, training_recipe
from train.trainer.checkpoint import CheckpointError, checkpoints, load_checkpoint, write_part
from train.trainer.checkpoint_writer import CheckpointWriter
from train.trainer.launch import train
from train.trainer.logging import RunLogger
from train.trainer.loop import Trainer
from train.trainer.parallel import barrier
from train.trainer.pipeline import open_pipeline
from train.trainer.recipe import TrainRecipe
from train.trainer.run_storage import RunStorage

WEIGHTS = "shard-00001-model-00001-of-00003.safetensors"


@pytest.mark.parametrize("what", ["half", "gone", "changed"])
def test_a_checkpoint_that_is_not_whole_is_named_and_never_used(recipe, undisturbed, tmp_path, what):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    newest = checkpoints(out / "checkpoints")[-1] / WEIGHTS
    if what == "half":
        os.truncate(newest, newest.stat().st_size // 2)
    elif what == "gone":
        newest.unlink()
    else:
        content = bytearray(newest.read_bytes())
        content[-1] ^= 1
        newest.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}.*remove .*step-00000006 to go on"):
        train(recipe, out)


def _saved(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed / "checkpoints" / "step-00000006", tmp_path / "step-00000006"))


def test_a_checkpoint_of_another_release_is_refused_and_not_loaded_as_nothing(undisturbed, tmp_path):
    path = _saved(undisturbed, tmp_path)
    record = json.loads((path / "checkpoint.json").read_text())
    (path / WEIGHTS).rename(path / "weights.safetensors")
    record["files"] = {"weights.safetensors": record["files"][WEIGHTS]}
    (path / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="has no shards; go on with the release that wrote it"):
        open_pipeline(path)


def test_a_model_of_which_weights_are_missing_is_not_drawn_with(undisturbed, tmp_path):
    path = _saved(undisturbed, tmp_path)
    record = json.loads((path / "checkpoint.json").read_text())
    for name in [name for name in record["files"] if "-model-00003-" not in name]:
        del record["files"][name]
        (path / name).unlink()
    (path / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="the trained weights have no "):
        open_pipeline(path)


def test_a_shard_that_the_record_does_not_name_is_refused(recipe, undisturbed, tmp_path):
    path = _saved(undisturbed, tmp_path / "run" / "checkpoints")
    left = "shard-00005-model-00001-of-00003.safetensors"
    shutil.copy(path / WEIGHTS, path / left)
    for use in (load_checkpoint, lambda _: Trainer(recipe, tmp_path / "run", torch.device("cpu"))):
        with pytest.raises(CheckpointError, match=f"{left} is not in its checkpoint.json.*remove this file"):
            use(path)


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

    def slow(folder: Path, *what: Any) -> dict[str, Any]:
        if folder.name.endswith("step-00000002"):
            went_on.append(display.done.wait(120))
        return write_part(folder, *what)

    monkeypatch.setattr("train.trainer.checkpoint_writer.write_part", slow)
    assert Trainer(recipe, tmp_path / "run", torch.device("cpu")).run(display)
    assert went_on == [True]
    for place in (0, 1):  # what was saved is what was learned by then
        expected, found = learned(undisturbed, place), learned(tmp_path / "run", place)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def _full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("train.trainer.checkpoint_writer.write_part", _full)
    with pytest.raises(RunError, match=r"no checkpoint could be written .*No space left on device"):
        train(recipe, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("what", ["folder", "record", "rename"])
def test_neither_a_refused_folder_nor_a_full_disk_is_a_traceback(tmp_path, monkeypatch, what):
    storage = RunStorage(tmp_path)
    if what == "folder":
        (tmp_path / "checkpoints").touch()
    else:
        monkeypatch.setattr(Path, "write_text" if what == "record" else "rename", _full)
    with (
        pytest.raises(RunError, match=f"{tmp_path}: no checkpoint could be written"),
        CheckpointWriter(storage, 1, RunLogger(None, None, None)) as writer,
    ):
        writer.write(1, {"weights/a": torch.zeros(2)}, {})
    assert not list(tmp_path.glob("checkpoints/*"))


def test_only_the_newest_checkpoints_are_kept(tmp_path, sd1, clip, dataset):
    run = {"checkpoint_every": 1, "keep_checkpoints": 2}
    assert train(training_recipe(sd1, clip, dataset, run=run, optimizer={"steps": 3}), tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002", "step-00000003"]


def _together_and_apart(rank: int, recipe: TrainRecipe, folders: list[Path], says: Path) -> None:
    """Two processes that go on, and save, in one folder; and two whose folders are not the same."""
    distributed.init_process_group("gloo", f"file://{says}.rendezvous", rank=rank, world_size=2)
    trainer = Trainer(recipe, folders[0], torch.device("cpu"))
    expected, _ = load_checkpoint(checkpoints(folders[0] / "checkpoints")[-1])
    assert trainer.step == 4 and not list(folders[0].glob(".shared-*"))
    for name, parameter in trainer.named.items():
        assert torch.equal(parameter, expected["weights"][name])
        assert torch.equal(trainer.average.weights[name], expected["average"][name])
        assert torch.equal(trainer.optimizer.state[parameter]["exp_avg"], expected["optimizer"][f"{name}.exp_avg"])
    trainer.step = 5
    with CheckpointWriter(trainer.storage, 9, RunLogger(None, None, None)) as writer:
        trainer._save(writer)
    barrier()
    again, record = load_checkpoint(folders[0] / "checkpoints" / "step-00000005")
    for kind, named in expected.items():
        assert all(torch.equal(again[kind][name], tensor) for name, tensor in named.items())
    sizes = [sum(f["bytes"] for n, f in record["files"].items() if n.startswith(f"shard-0000{k}")) for k in (1, 2)]
    assert 0.7 < sizes[0] / sizes[1] < 1.4, "each writes about half"
    try:
        Trainer(recipe, folders[rank], torch.device("cpu"))
    except RunError as error:
        Path(f"{says}-{rank}").write_text(str(error))
    distributed.destroy_process_group()


def test_ranks_read_and_write_a_part_each_and_are_refused_where_their_folders_are_not_the_same(
    undisturbed, tmp_path, sd1, clip, dataset
):
    behind = shutil.ignore_patterns("step-*6", "pipeline", "tensorboard")
    shutil.copytree(undisturbed, tmp_path / "has", ignore=behind)
    (tmp_path / "has" / ".shared-of-a-killed-run").touch()
    recipe = training_recipe(sd1, clip, dataset, run={"workers": 2, "micro_batch": 1})
    spawn(_together_and_apart, (recipe, [tmp_path / "has", tmp_path / "has-not"], tmp_path / "says"), nprocs=2)
    for rank, folder in enumerate(("has", "has-not")):
        said = (tmp_path / f"says-{rank}").read_text()
        assert f"{folder}: node " in said and "does not see the folder of that name" in said
