"""Whole runs: real Ray, real files, the toy models. Nothing is lost, done twice, or different the second time."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import boto3
import pytest
import webdataset

from datapipe.inspect import count_manifests, summarize
from datapipe.schema import Outcome, Reason, StageName, from_table
from datapipe.shards import Store, iter_tables, manifests
from tests.toy import PROJECT, command, digests, run, write_images, write_recipe

IMAGES = 44
SLICE_ROWS = 10


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, IMAGES)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "small.yaml", slice_rows=SLICE_ROWS)


@pytest.fixture(scope="module")
def undisturbed(images: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    done = run(recipe, images, out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_input_row_has_one_verdict_in_every_shard_and_in_the_whole(undisturbed, images):
    rows = len(list(images.glob("*.jpg")))
    found = list(manifests(Store(str(undisturbed)), "shard"))
    assert [m.first_row for m in found] == list(range(0, rows, SLICE_ROWS))
    assert sum(m.rows for m in found) == rows
    for manifest in found:
        assert sum(manifest.counts.values()) == manifest.rows
    samples = [s for t in iter_tables(Store(str(undisturbed))) for s in from_table(t)]
    assert [s.row for s in samples] == list(range(rows))
    assert all(s.verdict for s in samples)


def test_what_was_made_to_be_dropped_is_dropped_for_that_reason(undisturbed):
    losses = summarize(Store(str(undisturbed))).losses
    for reason in (
        Reason.WHITE_BACKGROUND, Reason.TOO_SMALL, Reason.UNDECODABLE, Reason.EXACT_DUPLICATE, Reason.NEAR_DUPLICATE,
    ):  # fmt: skip
        assert losses[StageName.SCREEN, reason, Outcome.DROPPED] == 1


def test_stock_readers_read_the_shards(undisturbed):
    kept = count_manifests(Store(str(undisturbed))).outcomes[Outcome.KEPT]
    assert kept > 20
    tars = sorted(str(p) for p in undisturbed.glob("shard-*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("rgb"))
    assert len(samples) == kept
    for sample in samples:
        height, width = sample["jpg"].shape[:2]
        assert (sample["json"]["width"], sample["json"]["height"]) == (width, height)
        assert sample["json"]["entities"]
    with tarfile.open(tars[0]) as tar:
        names = tar.getnames()
        assert names == sorted(names)
        assert {m.mtime for m in tar} == {0}


def test_a_second_run_does_nothing(undisturbed, images, recipe):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.iterdir()}
    again = run(recipe, images, undisturbed)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in undisturbed.iterdir() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def without_overriding_permissions(words: list[str]) -> list[str]:
    """The command as a user runs it to whom permissions apply: to root they do not."""
    return ["setpriv", "--bounding-set=-dac_override", *words] if os.geteuid() == 0 else words


def test_a_complete_dataset_that_can_only_be_read_is_complete_and_any_other_is_refused(
    undisturbed, images, recipe, tmp_path
):
    out = shutil.copytree(undisturbed, tmp_path / "out")

    def again() -> subprocess.CompletedProcess[str]:
        out.chmod(0o555)
        words = without_overriding_permissions(command(recipe, images, out))
        done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False)
        out.chmod(0o755)
        return done

    before = sorted(out.iterdir())
    complete = again()
    assert complete.returncode == 0, complete.stderr
    assert f"{out} is complete: nothing to do" in complete.stdout
    assert sorted(out.iterdir()) == before
    (out / "shard-000002.manifest.json").unlink()
    incomplete = again()
    assert incomplete.returncode == 2
    assert incomplete.stderr.startswith(f"sdd: {out}/.writable: permission denied")
    assert incomplete.stderr.count("\n") == 1


def test_so_is_a_complete_dataset_in_a_bucket_that_can_only_be_read(undisturbed, images, recipe, bucket):
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="finished")
    for path in undisturbed.iterdir():
        if path.is_file():
            client.upload_file(str(path), "finished", f"out/{path.name}")
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::finished/*"}
    client.put_bucket_policy(Bucket="finished", Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    done = run(recipe, images, "s3://finished/out")
    assert done.returncode == 0, done.stderr
    assert "s3://finished/out is complete: nothing to do" in done.stdout
    client.delete_object(Bucket="finished", Key="out/shard-000002.manifest.json")
    refused = run(recipe, images, "s3://finished/out")
    assert refused.returncode == 2
    assert refused.stderr.startswith("sdd: s3://finished/out/.writable: ")


def test_killed_at_random_moments_and_resumed_it_gives_the_bytes_of_an_undisturbed_run(
    undisturbed, images, recipe, tmp_path
):
    dice = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(
            command(recipe, images, tmp_path), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Wherever it is by then: starting, fetching, annotating, committing.
        shards = len(list(tmp_path.glob("*.manifest.json")))
        deadline = time.monotonic() + 120
        while (
            len(list(tmp_path.glob("*.manifest.json"))) < shards + 2
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = run(recipe, images, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert digests(tmp_path) == digests(undisturbed)


CRASHING_DECODER = """
import os, signal, sys, time

class Finder:
    # A decoder with bugs: some bytes crash it, some make it hang.
    def find_spec(self, name, path=None, target=None):
        if name != "datapipe.stages.stage":
            return None
        import datapipe.decoding as images
        decode = images.decode_rgb
        def buggy(data):
            if b"CRASHES THE DECODER" in data:
                os.kill(os.getpid(), signal.SIGKILL)
            if b"HANGS THE DECODER" in data:
                time.sleep(3600)
            return decode(data)
        images.decode_rgb = buggy
        return None

sys.meta_path.insert(0, Finder())
"""


def test_a_row_that_kills_or_hangs_its_worker_is_recorded_and_the_rest_are_kept(undisturbed, images, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "out"
    broken.mkdir()
    for path in images.iterdir():
        os.link(path, broken / path.name)
    store = Store(str(undisturbed))
    kept = [s for t in iter_tables(store) for s in from_table(t) if s.verdict and s.verdict.outcome is Outcome.KEPT]
    bad = {kept[3].row: b"CRASHES THE DECODER", kept[-3].row: b"HANGS THE DECODER"}
    for sample in kept:
        if sample.row in bad:
            data = (broken / sample.url).read_bytes()
            comment = bad[sample.row]
            (broken / sample.url).unlink()
            marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
            (broken / sample.url).write_bytes(data[:2] + marker + data[2:])
    (tmp_path / "sitecustomize.py").write_text(CRASHING_DECODER)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", slice_rows=SLICE_ROWS, caption={"micro_batch": 2}, run={"deadline_s": 15}
    )
    done = run(recipe, broken, out, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    after = [s for t in iter_tables(Store(str(out))) for s in from_table(t)]
    for sample in after:
        if sample.row in bad:
            assert sample.verdict and sample.verdict.reason is Reason.KILLED_WORKER
    still_kept = {s.row for s in after if s.verdict and s.verdict.outcome is Outcome.KEPT}
    assert still_kept == {s.row for s in kept} - set(bad)


def test_an_error_inside_a_worker_is_one_line_too(undisturbed, images, recipe, tmp_path):
    for path in undisturbed.iterdir():
        if path.name.startswith(("raw-", "run.json")):
            shutil.copy(path, tmp_path)
    (tmp_path / "raw-000001.tar").write_bytes(b"overwritten")
    done = run(recipe, images, tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("sdd: ")
    assert "raw-000001.tar: not the file its manifest describes" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_object_store_gets_the_same_bytes(undisturbed, images, recipe, bucket):
    done = run(recipe, images, f"{bucket}/run")
    assert done.returncode == 0, done.stderr
    store = Store(f"{bucket}/run")
    for name, digest in digests(undisturbed).items():
        assert hashlib.sha256(store.read(name)).hexdigest() == digest


def test_pools_that_hand_slices_on_between_nodes_of_which_one_is_replaced_give_the_same_bytes(
    undisturbed, images, tmp_path, nodes
):
    pools = [
        {"stages": ["caption", "tag"], "workers": 2, "cpus": 0.5},
        {"stages": ["ground", "segment", "select"], "workers": 1, "cpus": 0.5},
    ]
    settings = {"pools": pools, "fetch_workers": 2}
    recipe, out = write_recipe(tmp_path / "pools.yaml", slice_rows=SLICE_ROWS, run=settings), tmp_path / "out"
    running = subprocess.Popen(
        command(recipe, images, out, "--ray-address", nodes.address), cwd=PROJECT, stderr=subprocess.PIPE
    )
    while not list(out.glob("shard-*.manifest.json")):
        assert running.poll() is None
        time.sleep(0.1)
    nodes.kill_newest()
    nodes.add()
    error = running.communicate()[1]
    assert running.returncode == 0, error
    assert digests(out) == digests(undisturbed)


def test_the_run_goes_on_without_a_node_and_ends_in_one_line_without_the_head(
    undisturbed, images, recipe, tmp_path, nodes
):
    running = subprocess.Popen(
        command(recipe, images, tmp_path, "--ray-address", nodes.address),
        cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "20"},
    )  # fmt: skip

    def wait_for_shards(count: int) -> None:
        while len(list(tmp_path.glob("shard-*.manifest.json"))) < count:
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)

    wait_for_shards(1)
    nodes.kill_newest()
    wait_for_shards(2)
    nodes.kill_head()
    said, error = running.communicate()
    assert running.returncode == 2, error
    assert "(raylet)" not in said + error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("sdd: the head of Ray at ") and "has been gone for 15 s" in last
    whole = [path.name for path in tmp_path.glob("shard-*.manifest.json")]
    assert len(whole) >= 2
    for name in whole:  # which the same command leaves as they are, wherever it goes on
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def test_another_recipe_or_input_is_refused_in_one_line(undisturbed, images, recipe, tmp_path):
    other = run(recipe, images, undisturbed, "--set", "select.min_score=0.4")
    assert other.returncode == 2
    assert other.stderr.strip().count("\n") == 0
    assert "select.min_score was 0.5 and is now 0.4" in other.stderr
    write_images(tmp_path, 41, seed=5)
    assert run(recipe, tmp_path, undisturbed).returncode == 2


def test_settings_that_only_place_the_work_may_change_between_runs(undisturbed, images, recipe):
    again = run(recipe, images, undisturbed, "--set", "run.fetch_workers=2", "--set", "caption.micro_batch=3")
    assert again.returncode == 0
    assert json.loads((undisturbed / "run.json").read_text())["parts"][0]["rows"] == len(list(images.glob("*.jpg")))
