"""The benchmark of sampling runs, at a small size."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.toy import PROJECT


def test_what_subjects_cost_is_measured_with_and_without_each_measure():
    command = [sys.executable, "benchmarks/sample.py", "--px", "32", "--steps", "1", "--rounds", "1"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert list(found["time_over_base"]) == ["base", *(f"{n} subjects" for n in range(5))]
    memory = list(found["memory_over_base"].values())
    assert memory[0] == 1 and memory == sorted(memory)
    assert len(found["further_subject"]) == 3
    assert len(found["saving"]) == 4 and all(saving > 0 for saving in found["saving"].values())
