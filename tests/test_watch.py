"""What waits for a node that went away for good ends. (The head's loss is in `test_run.py`.)"""

from __future__ import annotations

import subprocess
import sys

from tests.nodes import Nodes
from tests.toy import PROJECT

# A process of its own, because Ray keeps to the authentication that the first cluster of a process has.
WAITING = """
import sys, time
import ray
from datapipe import cluster, watch
from datapipe.progress import Done
from subject_diffusion.errors import RunError

watch.STANDSTILL_S, watch.LOOK_S = 1.0, 0.2

@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)
class Worker:
    def ready(self):
        pass

    def work(self):
        time.sleep(3600)

with cluster.connected(sys.argv[1]):
    try:
        with watch.standstill_watched(Done, row_s=1.0):
            workers = [Worker.remote() for _ in range(2)]
            ray.get([worker.ready.remote() for worker in workers])
            print("both have work", flush=True)
            ray.get([worker.work.remote() for worker in workers])
    except RunError as error:
        print(error, flush=True)
"""


def test_what_waits_for_a_node_that_went_away_ends_in_one_line(nodes: Nodes):
    command = [sys.executable, "-c", WAITING, nodes.address]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        assert next(line for line in waiting.stdout if "both have work" in line)
        nodes.kill_newest()
        said = waiting.stdout.read()
    assert waiting.returncode == 0
    assert "a node went away, and nothing has moved for " in said
    assert "there are 1 CPU and 0 GPU on 1 node left" in said
