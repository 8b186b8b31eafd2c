"""The training benchmark's own lines run at small sizes."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.toy import PROJECT


def test_the_full_size_benchmark_runs_at_small_sizes():
    command = [sys.executable, "benchmarks/training.py", "--tiny", "--device", "cpu", "--batch", "2"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [(m["batch"], m["compiled"]) for m in found] == [(2, False), (2, True)]
    assert all(m["images_per_s"] > 0 and m["mfu"] > 0 for m in found)
