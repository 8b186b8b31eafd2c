"""`sdd status` says from any shell how far a run is, and Prometheus gets the same numbers from Ray."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from datapipe import status
from datapipe.inspect.state import state_of
from datapipe.ledger import Tally
from datapipe.progress import Done, Phase
from datapipe.schema import Reason
from datapipe.shards import Store
from datapipe.stages import ANNOTATE_STAGES
from tests.ports import free_port
from tests.toy import PROJECT, command, run, write_recipe
from tests.web import serving_toy_images

TALLY = Tally(999_999, 400_000, 99_999, 1e6, failed_by={Reason.ERROR: 99_998, Reason.KILLED_WORKER: 1})
ANNOTATING = Phase(
    2, 2, [ANNOTATE_STAGES], 999_999, shards=1_000, shards_before=400, stage_s={},
    workers={"caption+tag": 8, "ground+segment+select": 16},
)  # fmt: skip
ANNOTATED = Done(dict.fromkeys(ANNOTATE_STAGES, TALLY), shards=100)


def shown(store: Store, width: int = 40) -> list[str]:
    sink = io.StringIO()
    Console(file=sink, width=width).print(state_of(store))
    return [line.rstrip() for line in sink.getvalue().splitlines()]


def test_a_run_at_work_tells_all_of_it_on_40_columns(tmp_path):
    store = Store(str(tmp_path))
    status.in_folder(store, ANNOTATING)(ANNOTATED, 3600.0)
    lines = shown(store)
    assert re.fullmatch(r"last heard \d+ s ago", lines[0])
    assert lines[1] == "phase 2 of 2: 500/1,000 shards"
    assert "277.8 rows/s" in lines[2]
    assert [line.split() for line in lines[4:9]] == [
        [stage.value, "999,999", "500,000", "400,000", "99,999"] for stage in ANNOTATE_STAGES
    ]
    assert lines[9] == "slowest: caption, 20% of workers' time"
    assert "failed: segment killed_worker 1" in lines
    assert lines[-2:] == ["workers: 8 of caption+tag", "workers: 16 of ground+segment+select"]
    assert not any("…" in line for line in lines)


def test_a_run_that_is_still_starting_says_what_it_does(tmp_path, capsys):
    store = Store(str(tmp_path))
    status.begin(store, "loading models")
    assert capsys.readouterr().out == "loading models\n"
    assert shown(store)[1:] == ["loading models"]


def test_a_run_that_tells_nothing_new_may_have_been_killed(tmp_path):
    store = Store(str(tmp_path))
    status.begin(store, "loading models")
    told = json.loads(store.read(status.STATUS_FILE))
    store.put(status.STATUS_FILE, json.dumps({**told, "told_at": told["told_at"] - 5_000}).encode())
    lines = shown(store)
    assert re.fullmatch(r"last heard 5,\d+ s ago", lines[0])
    assert " ".join(lines[1:]) == "if the run was killed, the same command goes on loading models"


def test_a_bucket_holds_the_status_too(bucket, sdd):
    store = Store(f"{bucket}/status")
    status.in_folder(store, ANNOTATING)(ANNOTATED, 3600.0)
    code, printed, _ = sdd("status", f"{bucket}/status", "--json")
    assert code == 0
    told = json.loads(printed)
    assert told["shards"] == {"done": 500, "left": 500}
    assert told["stages"]["ground"]["failed_by"] == {"error": 99_998, "killed_worker": 1}
    store.remove([status.STATUS_FILE, status.STATUS_FILE])
    assert not store.exists(status.STATUS_FILE), "and what is gone may be removed again"


def test_only_what_changed_is_told_and_the_end_in_any_case(monkeypatch):
    monkeypatch.setattr(status, "TELL_S", 0.001)
    states = [Done(), Done(), Done(shards=1), Done(shards=1), Done(shards=1)]
    looked = threading.Event()

    def look() -> Done:
        if len(states) == 1:
            looked.set()
            return states[0]
        return states.pop(0)

    told: list[Done] = []
    with status.telling(look, lambda done, elapsed_s: told.append(done)):
        looked.wait()
        states[0] = Done(shards=2)
    assert told == [Done(), Done(shards=1), Done(shards=2)]


def test_a_status_that_cannot_be_written_ends_no_run(tmp_path):
    store = Store(str(tmp_path / "out"))
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("in the way")
    status.in_folder(store, ANNOTATING)(ANNOTATED, 1.0)


def test_what_is_no_dataset_is_one_line(refused, tmp_path):
    assert "no run.json here; name the folder" in refused("status", tmp_path)
    assert "no such folder" in refused("status", tmp_path / "nowhere")
    (tmp_path / status.STATUS_FILE).write_text("{}")
    assert "status.json: not what a run of this release tells; remove it" in refused("status", tmp_path)


REPORT_OFTEN = json.dumps({"metrics_report_interval_ms": 1_000})


@dataclass(frozen=True)
class Cluster:
    """`address`: of its head; `metrics_url`: where Prometheus would look."""

    address: str
    metrics_url: str

    def metrics(self) -> str:
        """What Prometheus would get, for whom the next time will do."""
        try:
            with urllib.request.urlopen(self.metrics_url) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""


@contextmanager
def started_cluster() -> Iterator[Cluster]:
    """A head as `ray start` starts it, on free ports."""
    port, metrics_port = free_port(), free_port()
    head = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
            f"--metrics-export-port={metrics_port}", "--include-dashboard=false", "--disable-usage-stats",
            "--object-store-memory=200000000", f"--system-config={REPORT_OFTEN}",
        ],
        start_new_session=True,
    )  # fmt: skip
    cluster = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics")
    try:
        waited_for(cluster.metrics, head)
        yield cluster
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def waited_for(there: Any, process: subprocess.Popen[Any]) -> None:
    while not there():
        assert process.poll() is None
        time.sleep(0.2)


@pytest.mark.timeout(900)  # two runs on a cluster of their own
def test_a_run_on_a_cluster_tells_status_and_prometheus_until_it_is_killed_and_then_finishes(
    tmp_path, sdd, monkeypatch
):
    # `ray start` turns on token authentication, which every process would need the token for.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    recipe = write_recipe(tmp_path / "small.yaml", slice_rows=10, fetch={"retries": 0}, toyworld=None)
    out = tmp_path / "out"
    released = threading.Event()

    def answer(row: int) -> int | None:
        if row >= 30:
            released.wait()
        return 404 if row == 3 else None

    dashboard = (PROJECT / "manifests/cluster/grafana.json").read_text("utf-8")
    in_dashboard = set(re.findall(r"ray_(sdd_\w+)", dashboard))
    scraped: dict[str, str] = {}

    def told() -> dict[str, Any]:
        return json.loads(sdd("status", out, "--json")[1] or "{}") if out.exists() else {}

    def all_is_told() -> bool:
        lines = re.findall(r"^(ray_(sdd_\w+)(?:{.*)?) \S+$", cluster.metrics(), re.MULTILINE)
        scraped.update({name: line for line, name in lines})
        return told().get("shards") == {"done": 3, "left": 1} and scraped.keys() >= in_dashboard

    (tmp_path / "web").mkdir()
    with serving_toy_images(tmp_path / "web", 60) as web, started_cluster() as cluster:
        web.answer = answer
        table = web.table(tmp_path / "urls.parquet", range(40))
        words = command(recipe, table, out, "--ray-address", cluster.address)
        process = subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        waited_for(all_is_told, process)
        assert scraped.keys() == in_dashboard
        at_work = told()
        process.kill()
        process.wait()
        released.set()
        killed = told()

        assert at_work["step"] == "phase 1 of 2"
        assert at_work["stages"]["fetch"]["failed_by"] == {"http_status": 1}
        assert at_work["slowest_stage"] == "fetch"
        assert at_work["workers"] == {"fetch+screen": 1}
        assert {**killed, "last_heard_s": 0} == {**at_work, "last_heard_s": 0}

        finished = run(recipe, table, out, "--ray-address", cluster.address)
    assert finished.returncode == 0, finished.stderr
    assert not (out / status.STATUS_FILE).exists()
    done = told()
    assert done["state"] == "finished"
    assert done["shards"] == {"done": 4, "left": 0}
    assert done["totals"]["rows"] == 40 and done["totals"]["failed"] == 1
    assert shown(Store(str(out)))[0] == "finished: 4/4 shards"

    (out / "shard-000002.manifest.json").unlink()
    assert told()["state"] == "unfinished"
    lines = shown(Store(str(out)))
    assert lines[:2] == ["3/4 shards", "4/4 fetched"]
    assert " ".join(lines[2:]).startswith("no run is at work; the same command goes on 30 rows: ")
