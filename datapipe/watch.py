"""Watches the cluster of a run at work: what goes away for good ends the run, with one line and within a known time."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import ray
from rich.console import Console

from datapipe import cluster
from datapipe.progress import Done, in_background
from subject_diffusion.errors import RunError

LOOK_S = 2.0
ANSWER_S = 5.0
"""How long the head may take to accept a connection."""
RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's variable for how long its core waits for the head, before it ends the process without a word; by default
`RAYS_PATIENCE_S`."""
RAYS_PATIENCE_S = 60.0
OUR_SHARE = 0.75
"""The share of that time after which the run ends by itself."""
STANDSTILL_S = 300.0
"""How long a run in which nothing moves waits for a node that went away, beyond the longest that a row may take."""


@contextmanager
def head_watched() -> Iterator[None]:
    """Ends the process, with exit code 2, when the head of Ray does not come back: every call would wait for it."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    patience_s = OUR_SHARE * float(os.environ.get(RAYS_PATIENCE, RAYS_PATIENCE_S))

    def watch(finished: threading.Event) -> None:
        heard: float | None = None  # A driver outside of the cluster's network may never reach it.
        while not finished.wait(LOOK_S):
            now = time.monotonic()
            if _accepts(host.strip("[]"), int(port)):
                heard = now
            elif heard is not None and now - heard > patience_s:
                _end(f"the head of Ray at {host}:{port} has been gone for {patience_s:.0f} s; start the same command "
                     "again once it is back, or with another cluster, and it goes on from here")  # fmt: skip

    with in_background(watch):
        yield


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), ANSWER_S).close()
    except OSError:
        return False
    return True


def _end(problem: str) -> NoReturn:
    Console(stderr=True).show_cursor()  # which the display of progress hides
    print(f"sdd: {problem}", file=sys.stderr, flush=True)
    os._exit(2)


@contextmanager
def standstill_watched(look: Callable[[], Done], row_s: float) -> Iterator[None]:
    """Raises RunError in the block when a node went away and nothing has moved since: then what is left has no room for
    an actor that others wait for.

    look: what the stages have done; row_s: how long a row may take. Without effect outside of the main thread, the only
    one that can be interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, problem = len(cluster.nodes()), ""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt  # Ray's core, which waits in the main thread, lets no other exception through.

    def watch(finished: threading.Event) -> None:
        nonlocal before, problem
        moved, done = time.monotonic(), look()
        while not finished.wait(LOOK_S):
            there, latest = len(cluster.nodes()), look()
            if there >= before or latest != done:
                before, moved, done = max(before, there), time.monotonic(), latest
            elif time.monotonic() - moved > STANDSTILL_S + row_s:
                problem = (
                    f"a node went away, and nothing has moved for {(time.monotonic() - moved) / 60:.0f} minutes; there "
                    f"are {cluster.resources()} left; the same command goes on from here, with what is there by then"
                )
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    handler = signal.signal(signal.SIGUSR1, stop)
    try:
        with in_background(watch):
            yield
    except KeyboardInterrupt:
        if problem:
            raise RunError(problem) from None
        raise
    finally:
        signal.signal(signal.SIGUSR1, handler)
