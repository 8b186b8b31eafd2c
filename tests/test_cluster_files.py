"""The files in manifests/cluster are what their programs take, and start a run that uses all of their GPUs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # comes with Ray, without types
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from torch.distributed.run import get_args_parser

from datapipe import placing
from datapipe.recipe import load_recipe
from subject_diffusion._version import __version__
from tests.documents import check_parses
from tests.toy import PROJECT

FOLDER = PROJECT / "manifests" / "cluster"
IMAGE = f"subject-diffusion:{__version__}"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_rays_launcher_takes_it(name):
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", ["aws.yaml", "Dockerfile", "rayjob.yaml"])
def test_the_image_is_of_this_version(name):
    assert set(re.findall(r"subject-diffusion:[\w.]+", (FOLDER / name).read_text())) == {IMAGE}


def command_of(name: str) -> list[str]:
    """The words after `sdd`: of a job's entrypoint, or of the command in a launcher's file's first comment."""
    if name == "rayjob.yaml":
        command = read(name)["spec"]["entrypoint"]
    else:
        comment = (FOLDER / name).read_text().replace("\n# ", " ")
        (command,) = re.findall(r"`(\S*sdd dataset [^`]*)`", comment)
    program, *words = shlex.split(command)
    assert Path(program).name == "sdd"
    return words


def gpu_nodes(name: str) -> list[tuple[float, float]]:
    """(CPUs, GPUs) of each node with GPUs that the cluster can have."""
    if name == "rayjob.yaml":
        (group,) = read(name)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        return [(float(limits["cpu"]), float(limits["nvidia.com/gpu"]))] * group["maxReplicas"]
    cluster = read(name)
    node = cluster["available_node_types"]["gpu"]
    most = min(node["max_workers"], cluster["max_workers"])
    return [(node["resources"]["CPU"], node["resources"]["GPU"])] * most


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "rayjob.yaml"])
def test_its_command_asks_for_workers_that_fill_every_gpu_which_the_cluster_can_have(name):
    words = command_of(name)
    check_parses(words)
    settings = load_recipe("sdd", [words[words.index("--set") + 1]]).run
    asked, nodes = placing.asked(settings, slices=1000), gpu_nodes(name)
    assert all(pool.workers for pool in settings.pools), "without, a run takes the nodes that are there"
    assert sum(pool.gpus for pool in asked) == sum(gpus for _, gpus in nodes)
    assert placing.fits(asked, nodes)


def test_the_kubernetes_job_runs_with_the_ray_that_is_tested():
    version = read("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray=={version}" in (PROJECT / "constraints.txt").read_text().splitlines()


def check_rayjob(job: dict[str, Any]) -> None:
    schema = yaml.safe_load((PROJECT / "tests" / "rayjob_schema.yaml").read_text())
    jsonschema.Draft202012Validator(schema).validate(job)


def test_kuberay_takes_it():
    check_rayjob(read("rayjob.yaml"))


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("ttlSecondsAfterFinished:", "ttlSecondAfterFinished:"),
        ("enableInTreeAutoscaling:", "enableInTreeAutoScaling:"),
        ("minReplicas: 1", "minReplica: 1"),
        ("resources:", "resource:"),
        ("secretRef:", "secretref:"),
        ("backoffLimit: 2", "backoffLimit: two"),
        ('num-cpus: "0"', "num-cpus: 0"),
        ("memory: 64Gi", "memory: 64 GB"),
        ("kind: RayJob", "kind: RayCluster"),
    ],
)
def test_kuberay_refuses_a_field_that_is_misspelled_or_of_another_type(written, instead):
    text = (FOLDER / "rayjob.yaml").read_text()
    assert written in text
    with pytest.raises(jsonschema.ValidationError):
        check_rayjob(yaml.safe_load(text.replace(written, instead)))


def submitted(script: str, tmp_path: Path, program: str, *words: str) -> list[str]:
    """What a job of Slurm's starts. The commands of Slurm are played, and so is the program that it starts on every
    node."""
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, does in {
        "scontrol": "seq -f node-%.0f 7 20000",  # more than a pipe holds
        "srun": 'exec "$@"',
        program: 'printf "%s\\n" "$@"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{does}\n")
        (commands / name).chmod(0o755)
    (commands / "activate").write_text(f"PATH={commands}:$PATH\n")
    job = {
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_PER_NODE": "h100:8",
    }
    return subprocess.run(
        ["bash", str(FOLDER / script), *words],
        cwd=tmp_path,
        env={**os.environ, **job},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def test_the_slurm_job_starts_ray_on_every_node_and_a_command_that_exists(tmp_path):
    # The real symmetric-run wants a node without another Ray.
    started = submitted("slurm.sh", tmp_path, "ray", "my images", "out", "--set", "run.stop_share=1")
    cut = started.index("--")
    assert started[:cut] == ["symmetric-run", "--address", "node-7:23456", "--min-nodes", "2"]
    program, *words = started[cut + 1 :]
    assert program == "sdd" and "my images" in words
    check_parses(words)


def test_the_slurm_job_of_training_starts_a_process_for_each_gpu_and_a_command_that_exists(tmp_path):
    started = submitted("slurm-train.sh", tmp_path, "torchrun", "s3://bucket/sdd", "out", "--set", "base=a/b")
    cut = started.index("-m")
    options = get_args_parser().parse_args(started)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "8", "node-7:23456")
    program, *words = started[cut + 1 :]
    assert program == "sdd" and "s3://bucket/sdd" in words and "run.workers=16" in words
    check_parses(words)
