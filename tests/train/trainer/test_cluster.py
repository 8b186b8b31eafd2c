"""A run on a cluster asks it for its GPUs, survives the death of a node, and encodes beforehand there."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapipe import cluster
from datapipe.cluster import connected
from subject_diffusion.errors import RunError
from subject_diffusion.settings import load_settings
from tests.nodes import Nodes, two_nodes
from tests.toy import PROJECT
from tests.train.datasets import write_dataset
from tests.train.training import write_training_recipe
from train.trainer.encoder_cache_run import fill_caches
from train.trainer.launch import device_of_cluster
from train.trainer.recipe import TrainRecipe

STEPS = 12


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with two_nodes() as started:
        yield started


@pytest.mark.timeout(900)
def test_a_node_that_is_killed_costs_the_steps_since_the_last_checkpoint(nodes, tmp_path, sd1, clip):
    dataset = write_dataset(tmp_path / "dataset", (6, 5, 7))
    run = {"workers": 2, "micro_batch": 2, "checkpoint_every": 2}
    recipe = write_training_recipe(tmp_path / "r.yaml", sd1, clip, dataset, run=run, optimizer={"steps": STEPS})
    command = [sys.executable, "-m", "sdd", "train", "--recipe", str(recipe), "--out", str(tmp_path / "run")]
    training = subprocess.Popen(
        [*command, "--ray-address", nodes.address], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    assert training.stderr is not None
    lines = []
    for line in training.stderr:
        lines.append(line)
        if "saved" in line and len(nodes.alive) == 2:
            nodes.kill_newest()
            break
    nodes.add()
    lines += training.stderr
    assert training.wait() == 0, "".join(lines)
    steps = [int(step) for step in re.findall(r"^step (\d+) ", "".join(lines), re.MULTILINE)]
    assert set(steps) == set(range(1, STEPS + 1))
    assert steps[-1] == STEPS and (tmp_path / "run" / "pipeline" / "model_index.json").exists()
    again = [after for before, after in itertools.pairwise(steps) if after <= before]
    assert all(step % 2 == 1 for step in again), "it goes on behind a checkpoint"
    # In a process of its own, because Ray keeps to the authentication that the first cluster of a process has.
    code = "import sys; from tests.train.trainer.test_cluster import check_devices; check_devices(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, str(recipe), nodes.address], cwd=PROJECT, check=True)


def check_devices(path: str, address: str) -> None:
    """On a cluster of two CPUs."""
    recipe = load_settings(TrainRecipe, path)
    cluster.AUTOSCALER_GRACE_S = 1
    with connected(address):
        _check_devices(recipe, address)
    drawn_once = ["examples.crops=2", "examples.reference.draws=2", "run.threads=1"]
    _check_caches(load_settings(TrainRecipe, path, drawn_once), address)


def _check_caches(recipe: TrainRecipe, address: str) -> None:
    """What the cluster's workers compute beforehand is what this process would."""
    alone = recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": 1})})
    assert fill_caches(alone) == {"latents": 3, "references": 3}
    files = [next(Path(recipe.sources[0].path).glob(f"{kind}-*/*.safetensors")) for kind in ("latents", "references")]
    expected = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    assert fill_caches(recipe, address) == {"latents": 1, "references": 1}
    assert [file.read_bytes() for file in files] == expected


def _check_devices(recipe: TrainRecipe, address: str) -> None:

    def with_run(**changes):
        return recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": 2, **changes})})

    assert device_of_cluster(with_run(device="cpu"), address).type == "cpu"
    with pytest.raises(
        RunError, match=r"the cluster has no GPU \(2 CPU and 0 GPU on 2 nodes\); set run.device=cuda to wait"
    ):
        device_of_cluster(with_run(device="auto"), address)
    with pytest.raises(RunError, match=r"asks for 2 times 1 CPU, 1 GPU, all at the same time, and there are 2 CPU"):
        device_of_cluster(with_run(device="cuda"), address)
    with pytest.raises(RunError, match=r"asks for 3 times 1 CPU, all at the same time"):
        device_of_cluster(with_run(device="cpu", workers=3), address)
