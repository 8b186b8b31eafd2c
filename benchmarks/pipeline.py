"""What Ray costs, and whether memory stays flat: `python benchmarks/pipeline.py [--images 400]`.

Speed: the annotate phase on Ray against the same stages called in one plain Python loop over the same raw shards, per
core
used, models loaded and Ray started beforehand in both. Memory: peak of the driver and its workers over an input and
over
one twice as long.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from datapipe import cluster, run
from datapipe.deduplicate import DuplicatesBySlice, mark_duplicates
from datapipe.isolation import Ledger
from datapipe.plan import Plan, claim_folder, make_plan
from datapipe.recipe import ANNOTATE_STAGES, build_stage, load_recipe
from datapipe.schema import Slice
from datapipe.shards import Store, read_manifest, read_slice, write_shard
from datapipe.sources import open_source
from datapipe.workers import run_stages
from toyworld.web import served

WARM_UP_SLICES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--slice-rows", type=int, default=25)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        report = measure(folder, arguments.images, arguments.slice_rows)
    finally:
        shutil.rmtree(folder)
    table = Table("measure", "value", box=None)
    for name, value in report.items():
        table.add_row(name, f"{value:.3g}")
    Console().print(table)
    print(json.dumps(report))


def measure(folder: Path, images: int, slice_rows: int) -> dict[str, float]:
    """Ratios and the figures they come from."""
    once = prepared(folder, "once", images, slice_rows)
    twice = prepared(folder, "twice", 2 * images, slice_rows)
    with cluster.connected(None):
        cores = cluster.workers_that_fit(1.0)
        with peak_memory() as memory:
            on_ray = timed_on_ray(once)
        with peak_memory() as memory_of_twice:
            timed_on_ray(twice)
    plain = timed_plainly(once)
    return {
        "images/s, plain loop, one core": plain,
        f"images/s, Ray, {cores} cores": on_ray,
        "Ray per core / plain loop": on_ray / cores / plain,
        "peak memory of twice the input / of the input": memory_of_twice[0] / memory[0],
    }


def prepared(folder: Path, name: str, images: int, slice_rows: int) -> Plan:
    """Raw shards and the table of duplicates, so that only annotation is timed."""
    recipe = load_recipe("manifests/recipes/toy.yaml", [f"slice_rows={slice_rows}", f"toyworld.images={images}"])
    assert recipe.toyworld is not None
    with served(recipe.toyworld, folder) as web:
        source = open_source(recipe.source.model_copy(update={"path": str(web.table)}), str(folder))
        store = Store(str(folder / name))
        plan = make_plan(recipe, source, store)
        claim_folder(plan, store)
        with cluster.connected(None):
            run.fetch(plan, store)
            run.find_all_duplicates(store, recipe.screen)
    return plan


def timed_on_ray(plan: Plan) -> float:
    """Images per second between the first committed shards and the last: without the start of workers and models."""
    store = Store(plan.out)
    arrivals: list[float] = []
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.05):
            done = plan.slices - len(plan.missing(store, "shard"))
            arrivals.extend([time.perf_counter()] * (done - len(arrivals)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    run.annotate(plan, store)
    time.sleep(0.2)
    finished.set()
    watcher.join()
    first, last = arrivals[WARM_UP_SLICES - 1], arrivals[-1]
    rows = sum(len(plan.rows_of(i)) for i in range(plan.slices)) - WARM_UP_SLICES * plan.recipe.slice_rows
    return rows / (last - first)


def timed_plainly(plan: Plan) -> float:
    """The same slices through the same stages, read and committed, in one loop of one thread."""
    torch.set_num_threads(1)
    store, target = Store(plan.out), Store(f"{plan.out}-plain")
    stages = [build_stage(name, plan.recipe) for name in ANNOTATE_STAGES]
    duplicates = DuplicatesBySlice(store, plan.recipe.slice_rows)
    ledger = Ledger()
    started, rows = 0.0, 0
    for index in range(plan.slices):
        if index == WARM_UP_SLICES:
            started = time.perf_counter()
        raw = read_slice(store, read_manifest(store, "raw", index))
        work = Slice(index, tuple(mark_duplicates(raw.samples, duplicates.of(index))))
        done = run_stages(stages, work, ledger, plan.recipe.run.deadline_s)
        write_shard(target, "shard", done, plan.provenance)
        if index >= WARM_UP_SLICES:
            rows += len(done.samples)
    return rows / (time.perf_counter() - started)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Highest sum of unshared memory over this process and its descendants, in bytes, as the list's one element."""
    peak = [0.0]
    finished = threading.Event()

    def sample() -> None:
        me = psutil.Process()
        while not finished.wait(0.2):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        finished.set()
        thread.join()


if __name__ == "__main__":
    main()
