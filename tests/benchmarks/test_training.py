"""The training benchmark's own lines run at small sizes."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.toy import PROJECT


def test_the_full_size_benchmark_runs_at_small_sizes():
    command = [sys.executable, "benchmarks/training.py", "--tiny", "--device", "cpu", "--batch", "1"]
    done = subprocess.run(
        [*command, "--variants", "plain", "FSDP2"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain, split = json.loads(done.stdout)
    assert (plain["variant"], split["variant"], plain["ratio"]) == ("plain", "FSDP2", 1)
    assert all(m["images_per_s"] > 0 and m["mfu"] > 0 for m in (plain, split))
    assert split["trained_mib"] < 0.55 * plain["trained_mib"]
