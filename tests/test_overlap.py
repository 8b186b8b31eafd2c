"""Where no duplicates are sought, slices are annotated while others are fetched, and the bytes are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datapipe.shards import Store, present
from tests.nodes import two_nodes
from tests.toy import PROJECT, command, digests, run, write_recipe
from tests.web import Web, serving_toy_images

ROWS, SLICE_ROWS = 40, 10
RAW = ["raw-000000.manifest.json", "raw-000001.manifest.json"]
POOL = "stages: [caption, tag, ground, segment, select], workers: 1"
ONE_CORE = ["--set", f"run.pools=[{{{POOL}}}]"]
"""Beside it there is room to fetch."""
EVERY_CORE = ["--set", f"run.pools=[{{{POOL}, cpus: {os.cpu_count()}}}]"]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving_toy_images(tmp_path_factory.mktemp("web"), ROWS + 20) as web:
        yield web


@pytest.fixture(scope="module")
def table(web: Web, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return web.table(tmp_path_factory.mktemp("table") / "urls.parquet", range(ROWS))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("recipe") / "small.yaml",
        slice_rows=SLICE_ROWS,
        toyworld=None,
        fetch={"retries": 0, "timeout_s": 100, "deadline_s": 100},
        screen={"exact_duplicates": False, "near_duplicate_bits": None},
    )


@pytest.fixture(scope="module")
def one_after_the_other(recipe: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one-after-the-other")
    done = run(recipe, table, out, *EVERY_CORE)
    assert done.returncode == 0, done.stderr
    assert "phase 2 of 2" in done.stderr
    return out


def comes(what: Callable[[], bool]) -> bool:
    """Whether it is so within a minute and a half."""
    deadline = time.monotonic() + 90
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return what()


def test_a_slice_is_annotated_before_the_last_is_fetched(recipe, web, table, one_after_the_other, tmp_path):
    first_shard = tmp_path / "shard-000000.manifest.json"
    web.answer = lambda row: None if row < ROWS - 1 or comes(first_shard.exists) else 503
    done = run(recipe, table, tmp_path, *ONE_CORE)
    web.answer = lambda row: None
    assert done.returncode == 0, done.stderr
    assert "phase 1 of 1" in done.stderr
    assert "phase 2" not in done.stderr
    assert "Deprecat" not in done.stderr
    assert digests(tmp_path) == digests(one_after_the_other)


def test_killed_and_resumed_it_gives_the_same_bytes(recipe, web, table, one_after_the_other, tmp_path):
    process = subprocess.Popen(
        command(recipe, table, tmp_path, *ONE_CORE),
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert comes((tmp_path / "shard-000000.manifest.json").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(present(Store(str(tmp_path)), "shard")) != list(range(ROWS // SLICE_ROWS))
    finished = run(recipe, table, tmp_path, *ONE_CORE)
    assert finished.returncode == 0, finished.stderr
    assert digests(tmp_path) == digests(one_after_the_other)


def test_what_was_fetched_in_vain_is_taken_back_with_what_was_made_of_it(
    recipe, web, table, one_after_the_other, tmp_path
):
    web.answer = lambda row: 503 if row >= 20 else None
    limits = ["--set", "run.stop_rows=15", "--set", "run.fetch_workers=1"]
    stopped = run(recipe, table, tmp_path, *ONE_CORE, *limits)
    web.answer = lambda row: None
    assert stopped.returncode == 2
    assert "fetch: 20 of the last 20 rows failed for one reason (http_status)" in stopped.stderr.splitlines()[-1]
    store = Store(str(tmp_path))
    assert list(present(store, "raw")) == [0, 1]
    assert set(present(store, "shard")) <= {0, 1}
    finished = run(recipe, table, tmp_path, *ONE_CORE, *limits)
    assert finished.returncode == 0, finished.stderr
    assert digests(tmp_path) == digests(one_after_the_other)


def test_a_last_slice_of_dead_addresses_costs_none_of_what_was_fetched_before(recipe, web, tmp_path):
    table = web.table(tmp_path / "urls.parquet", range(2 * SLICE_ROWS + 2))
    out = tmp_path / "out"
    web.answer = lambda row: None if row < 2 * SLICE_ROWS or not comes((out / RAW[1]).exists) else 404
    process = subprocess.Popen(
        command(recipe, table, out, *EVERY_CORE), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert comes((out / RAW[1]).exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: (out / name).stat().st_mtime_ns for name in RAW}
    (out / "raw-000002.manifest.json").unlink(missing_ok=True)
    web.answer = lambda row: None if row < 2 * SLICE_ROWS else 404
    done = run(recipe, table, out, *ONE_CORE)
    web.answer = lambda row: None
    assert done.returncode == 0, done.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in RAW} == before
    assert list(present(Store(str(out)), "shard")) == [0, 1, 2]


def test_on_two_nodes_of_which_one_is_replaced_it_gives_the_same_bytes(table, one_after_the_other, recipe, tmp_path):
    pool = [
        "--set",
        f"run.pools=[{{{POOL}, cpus: 0.5}}]",
        "--set",
        "run.fetch_cpus=0.5",
        "--set",
        "run.fetch_workers=2",
    ]
    with two_nodes() as nodes:
        running = subprocess.Popen(
            command(recipe, table, tmp_path, *pool, "--ray-address", nodes.address),
            cwd=PROJECT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert comes((tmp_path / "shard-000000.manifest.json").exists)
        nodes.kill_newest()
        nodes.add()
        _, error = running.communicate()
    assert running.returncode == 0, error
    assert "phase 1 of 1" in error
    assert digests(tmp_path) == digests(one_after_the_other)
