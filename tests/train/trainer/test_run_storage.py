"""A bucket that fails for a moment does not end a run."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from subject_diffusion.errors import RunError
from train.stream import cache
from train.trainer import run_storage
from train.trainer.checkpoint import KINDS, CheckpointError, load_checkpoint, saved_names
from train.trainer.checkpoint_writer import CheckpointWriter
from train.trainer.logging import RunLogger
from train.trainer.parallel import barrier, send_parts
from train.trainer.run_folder import CHECKPOINT_RECORD
from train.trainer.run_storage import RunStorage

_BUSY = OSError("503 Slow Down")


@pytest.fixture
def storage(bucket: str, tmp_path, monkeypatch) -> RunStorage:
    monkeypatch.setattr("train.trainer.run_storage._COPIES", tmp_path / "copies")
    monkeypatch.setattr(cache, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("train.trainer.run_storage._LOOK_EVERY_S", 0.0)
    return RunStorage(f"{bucket}/{tmp_path.name}")


def failing(call: Callable[..., Any], times: int, error: Exception = _BUSY) -> Callable[..., Any]:
    """The call, of which the first ones fail."""
    left = [times]

    def attempt(*args: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise error
        return call(*args, **named)

    return attempt


def test_checkpoints_are_written_read_and_removed_through_a_hiccup(storage, monkeypatch):
    for step in (1, 2):
        folder = storage.local / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / CHECKPOINT_RECORD).write_text(json.dumps({"step": step, "files": {"part": {"bytes": 1}}}))
        (folder / "part").write_text(str(step))
        (folder / "of-a-larger-run").touch()
    for name in ("put_file", "glob", "cat_file", "get_file", "rm", "rm_file"):
        monkeypatch.setattr(storage.store.file_system, name, failing(getattr(storage.store.file_system, name), 2))
    storage.publish(storage.local / "checkpoints")
    assert storage.checkpoints() == ["step-00000001", "step-00000002"]
    storage.keep_newest(1)
    assert storage.checkpoints() == ["step-00000002"]
    shutil.rmtree(storage.local / "checkpoints")
    fetched = storage.checkpoint("step-00000002")
    assert {path.name for path in fetched.iterdir()} == {CHECKPOINT_RECORD, "part"}
    assert (fetched / "part").read_text() == "2"
    (fetched / "part").write_text("")
    assert (storage.checkpoint("step-00000002") / "part").read_text() == "2", "half a copy is fetched again"
    storage.forget("step-00000002")
    assert not fetched.exists()


def test_a_bucket_that_does_not_answer_has_not_asked_to_stop(storage, monkeypatch):
    storage.ask_to_stop()
    monkeypatch.setattr(storage.store.file_system, "exists", failing(storage.store.file_system.exists, 1))
    assert not storage.asked_to_stop()
    assert storage.asked_to_stop()


def test_what_stays_wrong_is_told(storage, monkeypatch):
    monkeypatch.setattr(cache, "ATTEMPTS", 2)
    monkeypatch.setattr(storage.store.file_system, "glob", failing(storage.store.file_system.glob, 9))
    with pytest.raises(RunError, match="503 Slow Down"):
        storage.checkpoints()


def _save_from_two_nodes(rank: int, url: str, disks: Path) -> None:
    """Each process has a disk of its own."""
    distributed.init_process_group("gloo", f"file://{disks}/rendezvous", rank=rank, world_size=2)
    run_storage._COPIES = disks / str(rank)
    storage = RunStorage(url)
    (storage.local / "tensorboard").mkdir()
    killed = storage.local / "checkpoints" / f".partial-step-00000001-{rank}"
    killed.mkdir(parents=True)
    (killed / f"shard-0000{rank + 1}-model-00009-of-00009.safetensors").touch()
    state = {f"{kind}/{name}": torch.rand(3) for kind in KINDS for name in ("a", "b")}
    send_parts(state)
    record = dict.fromkeys(("recipe", "changes", "sources", "frozen", "stream"))
    with CheckpointWriter(storage, 1, RunLogger(None, None, None)) as writer:
        writer.write(1, state, record)
    barrier()
    path = storage.checkpoint("step-00000001")
    if rank:
        assert [p.name for p in path.parent.iterdir()] == ["step-00000001"], "nothing is left of what was uploaded"
    found, record = load_checkpoint(path)
    assert not any("00009" in name for name in record["files"]), "nor is what a killed run left taken along"
    assert all(torch.equal(found[name.split("/")[0]][name.split("/")[1]], tensor) for name, tensor in state.items())
    socket.gethostname = lambda: f"node-{rank}"
    if rank:
        os.truncate(path / min(record["files"]), 1)
    with pytest.raises(CheckpointError, match="is not what was written"):  # whichever machine's copy it is
        saved_names(path, record, copied=True)
    if rank:  # whatever fails on one rank, the others are told
        storage.publish = failing(storage.publish, 9, ValueError("no number"))  # type: ignore[method-assign]
    with (
        pytest.raises(RunError, match=r"no checkpoint could be written .*no number"),
        CheckpointWriter(storage, 1, RunLogger(None, None, None)) as writer,
    ):
        writer.write(2, state, record)
    distributed.destroy_process_group()


def test_nodes_without_a_shared_disk_write_one_checkpoint_into_a_bucket(bucket: str, tmp_path):
    spawn(_save_from_two_nodes, (f"{bucket}/{tmp_path.name}", tmp_path), nprocs=2)
