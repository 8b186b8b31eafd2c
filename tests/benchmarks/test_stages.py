"""The benchmark of the model stages runs to its end and reports what it measured."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.toy import PROJECT


def measured(file, *more: str) -> list[dict[str, float]]:
    command = [sys.executable, "benchmarks/stages.py", "--json", str(file), *more]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert len(found) == 3
    for m in found:
        assert m["ratio"] == m["batched"] / m["one_at_a_time"] > 0
        assert m["name"] in done.stdout
    return found


def test_the_networks_of_the_full_size_benchmark_run_at_small_sizes(tmp_path):
    sizes = ("--images", "4", "--batch", "2")
    found = measured(tmp_path / "found.json", "--full-size", "--tiny", "--device", "cpu", *sizes)
    assert all(m["share_of_matrix_rate"] > 0 and m["memory_gib"] is None for m in found)


def test_the_toy_models_are_timed_in_batches_and_alone(tmp_path):
    found = measured(tmp_path / "found.json", "--images", "4", "--batch", "2")
    assert [m["name"] for m in found] == ["caption", "ground", "segment"]
