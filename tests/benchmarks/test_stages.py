"""The benchmark of the model stages runs to its end and reports what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import stages
from tests.toy import PROJECT


def measured(file, *more: str) -> list[dict[str, Any]]:
    command = [sys.executable, "benchmarks/stages.py", "--json", str(file), *more]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(file.read_text())
    assert len(found) == 3
    for m in found:
        assert min(m["one_at_a_time"], m["batched"], m["ratio"]) > 0
        assert m["name"] in done.stdout
    return found


def test_the_networks_of_the_full_size_benchmark_run_at_small_sizes(tmp_path):
    sizes = ("--images", "4", "--batch", "2")
    found = measured(tmp_path / "found.json", "--full-size", "--tiny", "--device", "cpu", *sizes)
    assert all(m["share_of_matrix_rate"] > 0 and m["memory_gib"] is None for m in found)


def test_the_toy_models_are_timed_in_batches_and_alone(tmp_path):
    found = measured(tmp_path / "found.json", "--images", "4", "--batch", "2")
    assert [m["name"] for m in found] == ["caption", "ground", "segment"]


def test_the_rate_is_images_over_the_time_after_warm_up(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    durations = [50.0, 20.0, 10.0] + [0.5] * 4  # of each call: three to warm up, then those that count
    seen: list[torch.Tensor] = []

    def call(pixels: torch.Tensor) -> None:
        nonlocal now
        now += durations[len(seen)]
        seen.append(pixels)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    pixels = torch.zeros(2)
    found = stages.rate(call, {"pixels": pixels}, images=8, batch=2, rig=stages.Rig(torch.device("cpu"), tiny=True))
    assert found == 8 / 2.0
    assert len(seen) == len(durations) and all(given is pixels for given in seen)


def test_the_report_says_how_many_times_faster_a_batch_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "found.json"
    stages.report([stages.Measurement("caption", 2.0, 7.0), stages.Measurement("ground", 8.0, 2.0, 1.5, 0.25)], file)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed if line.split()[:1] in (["caption"], ["ground"])] == [
        ["caption", "2.0", "7.0", "3.50"],
        ["ground", "8.0", "2.0", "0.25", "1.5", "25%"],
    ]
    assert [m["ratio"] for m in json.loads(file.read_text())] == [3.5, 0.25]
