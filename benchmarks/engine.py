"""What the engine costs for each row: `python -m benchmarks.engine [--workers 1 2 4] [--slices 6] [--rows 1000]`.

Stages that do nothing annotate raw shards on Ray, so that what is left is reading and checking a slice, the ledger's
calls, writing the shard, and Ray: the time of a worker for each row, and the CPU time of all processes for each row,
which hardly depends on what else is running.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.no_op import NoOpRecipe
from datapipe import cluster, run
from datapipe.deduplicate import duplicates_table, write_duplicates
from datapipe.plan import Part, Plan
from datapipe.progress import in_background
from datapipe.schema import Sample, Slice
from datapipe.shards import Provenance, Store, present, write_shard
from subject_diffusion.settings import load_settings

PROVENANCE = Provenance("0" * 64, "0" * 64, "0" * 64, {})
SIDE_PX = 256
LOOK_S = 0.05


@dataclass(frozen=True)
class Cost:
    """A line of the report. `core_ms`: time of a core that a worker has, for each row; `cpu_ms`: CPU time of all
    processes, for each row."""

    workers: int
    core_ms: float
    cpu_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--slices", type=int, default=6, help="for each worker")
    parser.add_argument("--rows", type=int, default=1000, help="of a slice")
    arguments = parser.parse_args()
    costs = [measured(workers, arguments.slices, arguments.rows) for workers in arguments.workers]
    table = Table("workers", "time of a core, ms/row", "CPU time of all, ms/row", box=None)
    for cost in costs:
        table.add_row(str(cost.workers), f"{cost.core_ms:.2f}", f"{cost.cpu_ms:.2f}")
    Console().print(table)
    print(json.dumps([asdict(cost) for cost in costs]))


def measured(workers: int, slices: int, rows: int) -> Cost:
    """The cost from when there are as many shards as workers, which are warm then, to when there are all but as many,
    because the first worker has nothing left to do then."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as out:
        plan, store = prepared(out, workers * slices, rows), Store(out)
        pool = plan.recipe.run.pools[0].model_copy(update={"workers": workers, "cpus": 0.01})
        settings = plan.recipe.run.model_copy(update={"pools": (pool,)})
        seen: list[tuple[int, float, float]] = []

        def look(finished: threading.Event) -> None:
            while not finished.wait(LOOK_S):
                if workers <= (shards := len(present(store, "shard"))) <= workers * (slices - 1):
                    seen.append((shards, time.monotonic(), cpu_s()))

        with cluster.connected(None):
            cores = sum(cpus for cpus, _ in cluster.nodes())
            with in_background(look):
                run.annotate(plan, settings, store, run.Costs({}, 0.0))
    (first, began, cpu_before), (last, ended, cpu_after) = seen[0], seen[-1]
    done = (last - first) * rows
    return Cost(workers, 1000 * (ended - began) * min(workers, cores) / done, 1000 * (cpu_after - cpu_before) / done)


def cpu_s() -> float:
    """CPU time of this process and its descendants, among them all of Ray's."""
    total, me = 0.0, psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def prepared(out: str, slices: int, rows: int) -> Plan:
    """Raw shards of one photograph again and again, and no duplicates."""
    noise = np.random.default_rng(0).integers(0, 255, (SIDE_PX // 8, SIDE_PX // 8, 3), np.uint8)
    _, jpeg = cv2.imencode(".jpg", cv2.resize(noise, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC))
    image, store = bytes(jpeg), Store(out)
    for index in range(slices):
        samples = [
            Sample(row=row, image=image, width=SIDE_PX, height=SIDE_PX, caption="a mug")
            for row in range(index * rows, (index + 1) * rows)
        ]
        write_shard(store, "raw", Slice(index, tuple(samples)), PROVENANCE)
    none = np.empty(0, np.int64)
    write_duplicates(store, duplicates_table(none, none, none.astype(bool)), parts=1)
    recipe = load_settings(NoOpRecipe, "toy", ["toyworld=null", f"slice_rows={rows}"])
    return Plan(recipe, (Part(slices * rows, "0" * 64),), {}, out, PROVENANCE)


if __name__ == "__main__":
    main()
