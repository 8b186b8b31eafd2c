"""What this project needs of Ray: connect, find room for the pools, run a dataset to its end."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import ray
from ray._private import ray_constants
from ray._private.ray_logging import stdout_deduplicator
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from datapipe import placing
from datapipe.recipe import Pool, RunSettings
from subject_diffusion.errors import RunError, one_line

CONNECT_TIMEOUT_S = 5.0
STARTS = 3
"""How often Ray is started on this machine before the run gives up: it allows its own processes 30 s, which is too
little where the machine is busy."""
AUTOSCALER_GRACE_S = 30.0
"""How long a cluster may take to show that it has an autoscaler which is bringing nodes. One looks every 5 seconds."""
LONGEST_WAIT_S = 1800.0
"""How long the run waits for nodes in all."""
PLACES_S = 10.0
"""How long Ray may take to find places for the actors of a pool, on nodes that are there."""
SAM_HUGE_ON_A_CORE_S = 130
"""Seconds per image that one CPU core took in SAM ViT-H's encoder: measured, float32, one thread."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray for the length of a run: the cluster at `address` ("auto" or host:port), or one embedded in this process."""
    if address and ":" in address.removeprefix("ray://"):
        _check_reachable(address)
    # Ray's C++ core writes straight to the terminal, including warnings about its own internals.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with _interruptible():
            if address:
                _start(address)
            else:
                with _without_notice(), _on_loopback():
                    _start(address)
    except Exception as error:  # bare ones of Ray's are among them
        where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "Ray on this machine"
        raise RunError(f"cannot connect to {where}: {one_line(error)}") from None
    _set_up_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def _start(address: str | None) -> None:
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
            return
        except Exception:  # a bare one where Ray's own processes were slow to start
            ray.shutdown()
            if address or attempt == STARTS:
                raise


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Lets Ray's processes listen on loopback alone, as they do on macOS and Windows. On Linux it cannot be asked for:
    in place of 127.0.0.1, `ray.init` takes the machine's own address, and then they listen on all interfaces."""
    default = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = default


@contextmanager
def _without_notice() -> Iterator[None]:
    """Keeps from the terminal the line in which Ray's core says that it was told to be silent. Not for a cluster: if
    the core gave up on connecting, its last words would be lost."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            said.seek(0)
            for line in said:
                if b"RAY_BACKEND_LOG_LEVEL" not in line:
                    os.write(2, line)


def drain(dataset: Dataset) -> None:
    """Runs the dataset to its end."""
    for _ in dataset.iter_rows():
        pass


def nodes() -> list[tuple[float, float]]:
    """(CPUs, GPUs) of each node that is alive."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(r.get("CPU", 0.0), r.get("GPU", 0.0)) for r in resources]


def find_room(settings: RunSettings, slices: int, address: str | None) -> RunSettings:
    """Makes sure that the pools fit the cluster, and waits where an autoscaler is bringing what they need.

    Returns the settings; where there is no GPU and the recipe says to go on, with pools that ask for none. Raises
    RunError, which says what is asked for and what there is.
    """
    if max((cpus for cpus, _ in nodes()), default=0.0) < settings.fetch_cpus:
        raise RunError(
            f"run.fetch_cpus asks for {settings.fetch_cpus:g} CPU on one node; there are {resources()}; set it lower"
        )
    pools = placing.asked(settings, slices)
    if has_room(pools, address):
        return settings
    if any(pool.gpus for pool in pools) and not any(gpus for _, gpus in nodes()):
        if not settings.without_gpu:
            raise RunError(
                f"run.pools asks for GPUs ({placing.described(pools)}), and there are {resources()}. With large models "
                f"a CPU core needs minutes per image (SAM ViT-H alone: {SAM_HUGE_ON_A_CORE_S} s); to go on anyway, "
                "--set run.without_gpu=true"
            )
        on_cpu = tuple(pool.model_copy(update={"gpus": 0.0}) for pool in settings.pools)
        settings = settings.model_copy(update={"pools": on_cpu})
        pools = placing.asked(settings, slices)
    if not placing.fits(pools, nodes()):
        raise RunError(
            f"run.pools asks for {placing.described(pools)}, all at the same time, and there are {resources()}; "
            "give the pools less of it, or fewer workers (run.pools)"
        )
    return settings


def has_room(pools: Sequence[Pool], address: str | None) -> bool:
    """Whether an actor of each of these fits at the same time; waits where an autoscaler is bringing what they need."""
    return placing.fits(pools, nodes()) or (address is not None and _nodes_came(pools))


def fetch_workers(settings: RunSettings) -> int:
    """How many actors download: as the recipe says, or as many as fit; at least one."""
    return settings.fetch_workers or max(1, placing.fetchers(settings, [cpus for cpus, _ in nodes()]))


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Keeps an actor beside the driver, whose end is the run's end anyway: other nodes may go away."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def room_kept(pools: Sequence[Pool], workers: Sequence[int]) -> Iterator[list[PlacementGroupSchedulingStrategy] | None]:
    """Keeps the places of so many actors of each pool free of all others, as long as the block lasts. Gives how the
    actors of each are to be scheduled; None where not all of them have found a place."""
    groups = [placement_group([_claim(pool)] * size) for pool, size in zip(pools, workers, strict=True)]
    try:
        found = all(group.wait(PLACES_S) for group in groups)
        yield [PlacementGroupSchedulingStrategy(group) for group in groups] if found else None
    finally:
        for group in groups:
            remove_placement_group(group)


def _claim(pool: Pool) -> dict[str, float]:
    return {"CPU": pool.cpus} | ({"GPU": pool.gpus} if pool.gpus else {})


def workers_out_of_memory() -> int:
    """How many workers Ray's memory monitor has ended so far, on all nodes. For a process of Ray's."""
    from ray._private.state import state
    from ray.core.generated.common_pb2 import NODE_OUT_OF_MEMORY
    from ray.core.generated.gcs_pb2 import WorkerTableData

    table = state._connect_and_get_accessor().get_worker_table()
    return sum(WorkerTableData.FromString(worker).exit_type == NODE_OUT_OF_MEMORY for worker in table)


def pool_of(size: int) -> ActorPoolStrategy:
    """A fixed pool whose actors take one slice at a time, because a second call in flight could not be told from the
    deadly one."""
    return ActorPoolStrategy(size=size, max_concurrent_calls_per_actor=1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end this block as they would any other, although Python drops what a handler raises in the
    hooks that run around a fork, Ray starts its processes by forks, and Ray and its core handle SIGTERM themselves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def tell(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            report(dropped)

    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, note)
    report, sys.unraisablehook = sys.unraisablehook, tell
    try:
        yield
    except SystemExit:
        came.append(signal.SIGTERM)  # Ray's handler raises it
    finally:
        sys.unraisablehook = report
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _check_reachable(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise RunError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); "
            "start one with `ray start --head`, or leave it out"
        ) from None


def resources() -> str:
    """What the cluster has, in words."""
    found = nodes()
    cpus, gpus = (sum(each) for each in zip(*found, strict=True))
    return f"{cpus:g} CPU and {gpus:g} GPU on {len(found)} node{'s' if len(found) > 1 else ''}"


def _nodes_came(pools: Sequence[Pool]) -> bool:
    """Asks the cluster for room for all of these actors, and waits as long as an autoscaler is bringing nodes."""
    print(f"waiting for nodes with room for {placing.described(pools)}", file=sys.stderr)
    group = placement_group([_claim(pool) for pool in pools])
    started = last_seen = time.monotonic()
    try:
        while not group.wait(1):
            now = time.monotonic()
            if _nodes_are_coming():
                last_seen = now
            if now - last_seen > AUTOSCALER_GRACE_S or now - started > LONGEST_WAIT_S:
                return False
        return True
    finally:
        remove_placement_group(group)


def _nodes_are_coming() -> bool:
    """Whether an autoscaler, in either of Ray's versions, has started nodes that are not there yet."""
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return bool(status.pending_nodes or status.pending_launches)
    status = json.loads(_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS) or b"{}")
    report = status.get("autoscaler_report") or {}
    return bool(report.get("pending_nodes") or report.get("pending_launches"))


def _set_up_ray_data() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # It walks every page of a worker each second, only for statistics.
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # What raylets say of workers, leases and retries; it is in Ray's logs.
    stdout_deduplicator.skip_re = re.compile("")
