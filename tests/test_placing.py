"""Pools are placed before anything is fetched: what does not fit is said, with what was asked for and what is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from datapipe import cluster, duplicates_on_ray, placing
from datapipe.duplicate_search import near_duplicates
from datapipe.growing import with_input
from datapipe.plan import make_plan
from datapipe.recipe import Pool, RunSettings, load_recipe
from datapipe.run import ask_models
from datapipe.schema import StageName
from datapipe.shards import Store
from datapipe.sources import open_source
from subject_diffusion.errors import RecipeError, RunError
from tests.ports import free_port
from tests.toy import PROJECT, TOY_RECIPE, write_images

FIRST = (StageName.CAPTION, StageName.TAG)
SECOND = (StageName.GROUND, StageName.SEGMENT, StageName.SELECT)
SDD = load_recipe(PROJECT / "manifests/recipes/sdd.yaml").run


def run_settings(cpus: float = 1, gpus: float = 0, workers: int | None = None) -> RunSettings:
    return RunSettings(
        pools=tuple(Pool(stages=stages, cpus=cpus, gpus=gpus, workers=workers) for stages in (FIRST, SECOND))
    )


def test_the_papers_recipe_fits_one_gpu_and_fills_as_many_as_there_are():
    assert placing.fits(placing.asked(SDD, 100), [(8, 1)])
    assert placing.workers_of(SDD, [(8, 1)], 100) == [1, 1]
    assert placing.workers_of(SDD, [(8, 1)] * 5, 100) == [5, 5]
    assert placing.workers_of(SDD, [(192, 8)], 100) == [8, 8]
    assert placing.workers_of(SDD, [(192, 8)], 3) == [3, 3]


@pytest.mark.parametrize(
    ("settings", "nodes", "fit"),
    [
        (run_settings(gpus=1), [(8, 1)], False),
        (run_settings(gpus=1), [(8, 1), (8, 1)], True),
        (run_settings(gpus=1), [(1, 2)], False),
        (run_settings(gpus=2), [(8, 1), (8, 1), (8, 1), (8, 1)], False),
        (run_settings(gpus=0.6), [(8, 1)], False),
        (run_settings(gpus=0.6), [(8, 2)], True),
        (run_settings(gpus=0.6, workers=2), [(8, 2)], False),
        (run_settings(cpus=0.5), [(1, 0)], True),
        (run_settings(cpus=2), [(2, 0), (1, 0)], False),
    ],
)
def test_actors_fit_where_nodes_and_gpus_hold_them_one_by_one(settings, nodes, fit):
    assert placing.fits(placing.asked(settings, 10), nodes) is fit


def test_as_many_actors_as_fit_share_the_nodes_evenly():
    third = run_settings(gpus=0.333)
    assert placing.workers_of(third, [(100, 3)], 100) == [4, 4]
    assert placing.workers_of(run_settings(cpus=3), [(8, 0), (4, 0)], 100) == [1, 1]
    assert placing.workers_of(run_settings(workers=3), [(2, 0)], 2) == [2, 2]
    mixed = RunSettings(pools=(Pool(stages=FIRST, workers=2, cpus=2), Pool(stages=SECOND, cpus=1)))
    assert placing.workers_of(mixed, [(8, 0)], 100) == [2, 4]


def test_downloads_get_the_cores_that_the_pools_leave_on_each_node():
    gpu = RunSettings(pools=(Pool(stages=FIRST, gpus=0.5), Pool(stages=SECOND, gpus=0.5)))
    assert placing.fetchers_beside(gpu, [(3, 0), (3, 1), (8, 1)], [2, 2]) == 3 + 1 + 6
    assert placing.fetchers_beside(gpu, [(3, 0), (3, 1)], [2, 2]) == 0, "not all of the pools fit"
    halves = gpu.model_copy(update={"fetch_cpus": 0.5})
    assert placing.fetchers_beside(halves, [(2.5, 1)], [1, 1]) == 1


def test_a_part_of_more_than_one_gpu_is_refused_with_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {pools: [{stages: [caption, tag, ground, segment, select], gpus: 1.5}]}")
    with pytest.raises(RecipeError, match=r"1\.5 is neither a whole number nor a fraction"):
        load_recipe(path)


@pytest.fixture(scope="class")
def without_gpu() -> Iterator[None]:
    """Ray on two CPUs and no GPU."""
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("without_gpu")
class TestOnTwoCpusWithoutGpu:
    def test_what_fits_is_left_as_it_is(self):
        settings = run_settings()
        assert cluster.find_room(settings, 10, None) is settings

    def test_what_is_too_much_is_said_with_what_is_there(self):
        with pytest.raises(RunError) as refused:
            cluster.find_room(run_settings(cpus=2), 10, None)
        line = str(refused.value)
        assert "run.pools asks for caption+tag: 2 CPU; ground+segment+select: 2 CPU, all at the same time" in line
        assert "there are 2 CPU and 0 GPU on 1 node" in line
        with pytest.raises(RunError, match=r"caption\+tag: 2 times 1 CPU"):
            cluster.find_room(run_settings(workers=2), 10, None)
        with pytest.raises(RunError, match=r"run\.fetch_cpus asks for 4 CPU"):
            cluster.find_room(RunSettings(fetch_cpus=4), 10, None)

    def test_near_duplicates_are_looked_for_in_a_task_for_each_cpu(self, monkeypatch):
        monkeypatch.setattr(duplicates_on_ray, "SPREAD_FROM", 100)
        hashes = np.unique(np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64))
        hashes[:50] = hashes[50:100] ^ np.uint64(0b1011)
        assert duplicates_on_ray.paired_on_ray(np.sort(hashes), 4).sum() == 100
        here = near_duplicates(hashes, 4)
        np.testing.assert_array_equal(near_duplicates(hashes, 4, duplicates_on_ray.paired_on_ray), here)

    def test_without_a_gpu_it_says_how_slow_that_is_and_goes_on_only_when_told(self):
        with pytest.raises(RunError) as refused:
            cluster.find_room(SDD, 10, None)
        line = str(refused.value)
        assert "run.pools asks for GPUs (caption+tag: 1 CPU, 0.5 GPU; ground+segment+select: 1 CPU, 0.5 GPU)" in line
        assert "0 GPU on 1 node" in line
        assert "With large models a CPU core needs minutes per image (SAM ViT-H alone: 130 s)" in line
        assert "--set run.without_gpu=true" in line
        told = cluster.find_room(SDD.model_copy(update={"without_gpu": True}), 10, None)
        assert [pool.gpus for pool in told.pools] == [0, 0]
        assert [pool.stages for pool in told.pools] == [FIRST, SECOND]

    def test_the_models_then_answer_on_the_cpu_and_it_says_how_long_that_takes(self, tmp_path, capsys):
        write_images(tmp_path / "images", 12)
        recipe = load_recipe(TOY_RECIPE, ["toyworld=null", "caption.micro_batch=auto", "run.without_gpu=true"])
        pools = tuple(Pool(stages=stages, gpus=1) for stages in (FIRST, SECOND))
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"pools": pools})})
        source = open_source(recipe.source.model_copy(update={"path": str(tmp_path / "images")}), str(tmp_path / "out"))
        store = Store(str(tmp_path / "out"))
        plan = make_plan(recipe, *with_input(source, store, recipe.slice_rows, append=False), store)
        settings = cluster.find_room(recipe.run, plan.slices, None)
        assert [pool.gpus for pool in settings.pools] == [0, 0]
        assert not ask_models(plan, settings, range(plan.slices))[1], "nothing is tried on a CPU"
        said = re.search(
            r"without a GPU: a test image took [\d.]+ s; if all of the (\d+) rows pass every stage, the run takes "
            r"about [\d.]+ minutes\n",
            capsys.readouterr().err,
        )
        assert said and int(said[1]) == source.rows


AUTOSCALER: dict[str, Any] = {
    "cluster_name": "test",
    "max_workers": 1,
    # Ray's wheel has this provider, but not the defaults that it would read under its own type.
    "provider": {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
}
for _key in ("auth", "docker", "file_mounts"):
    AUTOSCALER[_key] = {}
for _key in ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands",
             "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):  # fmt: skip
    AUTOSCALER[_key] = []
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"


@pytest.fixture(scope="module")
def autoscaling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of one CPU, with Ray's own autoscaler, which can bring a node with what it takes for a
    GPU: Ray starts it on this machine."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = tmp_path_factory.mktemp("autoscaler") / "config.json"
    AUTOSCALER["provider"] |= {"head_node_id": HEAD_ID, "gcs_address": address}
    config.write_text(json.dumps(AUTOSCALER))
    env = {
        **os.environ, "RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }  # fmt: skip
    head = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
         "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000",
         f"--autoscaling-config={config}"],
        env=env, start_new_session=True,
    )  # fmt: skip
    try:
        yield address
    finally:
        ray.shutdown()
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def connect(address: str) -> None:
    """Once its head is up."""
    for attempt in range(30):
        try:
            ray.init(address, log_to_driver=False)
            return
        except ConnectionError:
            if attempt == 29:
                raise


def test_a_cluster_with_an_autoscaler_is_given_the_time_to_bring_the_gpu(autoscaling, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    connect(autoscaling)
    assert not any(gpus for _, gpus in cluster.nodes())
    settings = run_settings(cpus=0.5, gpus=0.5)
    assert cluster.find_room(settings, 10, autoscaling) is settings
    assert sum(gpus for _, gpus in cluster.nodes()) == 1
    assert "waiting for nodes with room for caption+tag: 0.5 CPU, 0.5 GPU" in capsys.readouterr().err
    # More than it may ever bring is refused, after the time in which an autoscaler would have shown itself.
    monkeypatch.setattr(cluster, "AUTOSCALER_GRACE_S", 5.0)
    with pytest.raises(RunError, match=r"1 GPU on 2 nodes"):
        cluster.find_room(run_settings(gpus=1), 10, autoscaling)


class _Dropping:
    """What a destructor raises, Python drops, as it does in the hooks around a fork."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_ray_starts_is_not_lost_where_python_drops_it(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: _Dropping() and None)
    with pytest.raises(KeyboardInterrupt), cluster.connected(None):
        pytest.fail("the run went on")


LISTENING = """
import psutil, ray
from datapipe import cluster

with cluster.connected(None):
    ray.get(ray.remote(lambda: 1).remote())
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                print(process.name(), connection.laddr.ip)
"""


def test_a_ray_of_this_machine_listens_on_loopback_alone():
    done = subprocess.run([sys.executable, "-c", LISTENING], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, addresses = zip(*(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()), strict=True)
    assert {"raylet", "gcs_server"} <= set(names)
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
