"""Ray, as far as this project needs it: connect, size a pool, run a dataset to its end."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from datapipe.errors import RunError

CONNECT_TIMEOUT_S = 5.0


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray for the length of a run: the cluster at `address` ("auto" or host:port), or one embedded in this process."""
    if address and ":" in address.removeprefix("ray://"):
        _check_reachable(address)
    # Ray's C++ core writes straight to the terminal, warnings about its own internals too.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "Ray on this machine"
        raise RunError(f"cannot connect to {where}: {' '.join(str(error).split())[:200]}") from None
    _set_up_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def drain(dataset: Dataset) -> None:
    """Runs the dataset to its end."""
    for _ in dataset.iter_rows():
        pass


def workers_that_fit(cpus: float, gpus: float = 0.0) -> int:
    """How many actors of this size the cluster holds, at least one."""
    resources = ray.cluster_resources()
    by_cpu = resources.get("CPU", 0.0) / cpus
    by_gpu = resources.get("GPU", 0.0) / gpus if gpus else by_cpu
    if gpus and by_gpu < 1:
        raise RunError(
            f"the recipe wants {gpus:g} GPU a worker and the cluster has {resources.get('GPU', 0):g}; set run.pools"
        )
    return max(1, int(min(by_cpu, by_gpu)))


def pool_of(size: int) -> ActorPoolStrategy:
    """A fixed pool whose actors take one slice at a time: a second call in flight could not be told from the deadly
    one."""
    return ActorPoolStrategy(size=size, max_concurrent_calls_per_actor=1)


def _check_reachable(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise RunError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); "
            "start one with `ray start --head`, or leave it out"
        ) from None


def _set_up_ray_data() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # walks every page of a worker each second, for statistics alone
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
