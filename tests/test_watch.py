"""What waits for a node that went away for good ends. (The head's loss is in `test_run.py`.)"""

from __future__ import annotations

import time

import pytest
import ray

from datapipe import cluster, watch
from datapipe.progress import Done
from subject_diffusion.errors import RunError
from tests.nodes import Nodes


class Worker:
    def ready(self) -> None:
        """Is there."""

    def work(self) -> None:
        time.sleep(3600)


def lose_a_node(nodes: Nodes) -> None:
    """While both have work."""
    start = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Worker).remote
    workers = [start() for _ in nodes.alive]
    ray.get([worker.ready.remote() for worker in workers])
    under_way = [worker.work.remote() for worker in workers]
    nodes.kill_newest()
    ray.get(under_way)


def test_what_waits_for_a_node_that_went_away_ends_in_one_line(nodes: Nodes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "STANDSTILL_S", 1.0)
    monkeypatch.setattr(watch, "LOOK_S", 0.2)
    with cluster.connected(nodes.address), pytest.raises(RunError) as ended, watch.standstill_watched(Done, row_s=1.0):
        lose_a_node(nodes)
    assert "a node went away, and nothing has moved for " in str(ended.value)
    assert "there are 1 CPU and 0 GPU on 1 node left" in str(ended.value)
