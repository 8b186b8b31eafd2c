"""A Ray cluster of several nodes on this machine, which come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ports import free_port


class Nodes:
    """A Ray cluster of nodes with one CPU each, on this machine."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.alive: list[subprocess.Popen[bytes]] = []

    def add(self) -> None:
        """Starts a node; the first one is the head."""
        head = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        options = [f"--address={self.address}"] if self.alive else head
        start = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
        start += ["--disable-usage-stats", "--object-store-memory=200000000", *options]
        self.alive.append(subprocess.Popen(start, start_new_session=True))
        wait_for_nodes(self.address, self.alive)

    def kill_newest(self) -> None:
        self._kill(self.alive.pop())

    def kill_head(self) -> None:
        self._kill(self.alive.pop(0))

    def _kill(self, node: subprocess.Popen[bytes]) -> None:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Two nodes of one CPU each."""
    with pytest.MonkeyPatch.context() as patch:
        # `ray start` turns on token authentication, which every process would need the token for.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        nodes = Nodes()
        try:
            nodes.add()
            nodes.add()
            yield nodes
        finally:
            while nodes.alive:
                nodes.kill_newest()


def wait_for_nodes(address: str, nodes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until the cluster has as many nodes alive."""
    script = f"import ray; ray.init({address!r}, logging_level=50); print(sum(n['Alive'] for n in ray.nodes()))"
    for _ in range(20):
        assert all(node.poll() is None for node in nodes), "a node has ended"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=200)
        if done.stdout.strip() == str(len(nodes)):
            return
        time.sleep(1)
    raise AssertionError(f"no {len(nodes)} nodes: {done.stderr[-500:]}")
