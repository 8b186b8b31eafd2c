"""What Ray costs, and whether memory stays flat: `python benchmarks/pipeline.py [--images 2000]`.

Speed: the annotate phase on Ray against the same stages called in one plain Python loop over the same raw shards, per
core used, with the start of Ray, of workers and of models left out. Cores that work at the same time share caches and
memory, so the same plain loop is also timed in as many processes at once as there are cores: no scheduler can do
better than that.

Memory: the peak of the driver, Ray and the workers together over an input, and over one twice as long.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from datapipe import cluster, run
from datapipe.deduplicate import DuplicatesBySlice, find_all_duplicates, mark_duplicates
from datapipe.growing import with_input
from datapipe.ledger import Ledger
from datapipe.plan import Plan, claim_folder, make_plan
from datapipe.recipe import build_stage
from datapipe.schema import Slice
from datapipe.shards import Store, read_manifest, read_slice, write_shard
from datapipe.sources import open_source
from datapipe.stages import ANNOTATE_STAGES
from datapipe.workers import run_stages
from subject_diffusion.settings import load_settings
from toyworld.recipe import ToyRecipe
from toyworld.server import served

UNKNOWN = run.Costs({}, 0.0)
WARM_UP_SLICES = 2  # for each worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        report = measure(folder, arguments.images)
    finally:
        shutil.rmtree(folder)
    table = Table("measure", "value", box=None)
    for name, value in report.items():
        table.add_row(name, f"{value:.3g}")
    Console().print(table)
    print(json.dumps(report))


def measure(folder: Path, images: int) -> dict[str, float]:
    """Ratios and the figures they come from."""
    once = prepared(folder, "once", images)
    twice = prepared(folder, "twice", 2 * images)
    with cluster.connected(None):
        cores = int(sum(cpus for cpus, _ in cluster.nodes()))
        on_ray = timed_on_ray(twice, cores)
    plain = timed_plainly(once, 1)
    plain_on_all = timed_plainly(once, cores)
    memory, memory_of_twice = (peak_memory(plan) for plan in (once, twice))
    return {
        "images/s, plain loop, one core": plain,
        f"images/s, {cores} plain loops at once": plain_on_all,
        f"images/s, Ray, {cores} cores": on_ray,
        "Ray per core / plain loop": on_ray / cores / plain,
        "Ray / plain loops at once": on_ray / plain_on_all,
        "peak memory of the input, MB": memory / 1e6,
        "peak memory of twice the input / of the input": memory_of_twice / memory,
    }


def prepared(folder: Path, name: str, images: int) -> Plan:
    """Raw shards and the table of duplicates, so that only annotation is timed."""
    recipe = load_settings(ToyRecipe, "toy", [f"toyworld.images={images}"])
    assert recipe.toyworld is not None
    with served(recipe.toyworld, folder) as web:
        source = open_source(recipe.source.model_copy(update={"path": str(web.table)}), str(folder))
        store = Store(str(folder / name))
        plan = make_plan(recipe, *with_input(source, store, recipe.slice_rows, append=False), store)
        claim_folder(plan, store)
        with cluster.connected(None):
            run.fetch(plan, store, UNKNOWN)
            find_all_duplicates(store, recipe.screen, plan.parts)
    return plan


def timed_on_ray(plan: Plan, workers: int) -> float:
    """Images per second from when every worker is warm to when the first has no slice left. Removes the shards that it
    made."""
    store = Store(plan.out)
    run.annotate(plan, plan.recipe.run, store, UNKNOWN)
    commits = sorted(path.stat().st_mtime for path in Path(plan.out).glob("shard-*.manifest.json"))
    warm_up = WARM_UP_SLICES * workers
    for path in Path(plan.out).glob("shard-*"):
        path.unlink()
    first, last = warm_up - 1, len(commits) - workers
    return (last - first) * plan.recipe.slice_rows / (commits[last] - commits[first])


def timed_plainly(plan: Plan, loops: int) -> float:
    """Images per second of `loops` processes, each of which takes all the slices through the same stages in one loop
    of one thread, from when all are warm to when the first has finished."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(loops), context.Queue()
    processes = [context.Process(target=_plain_loop, args=(plan, k, ready, results)) for k in range(loops)]
    for process in processes:
        process.start()
    rates: list[float] = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def _plain_loop(plan: Plan, number: int, ready: Any, results: Any) -> None:
    torch.set_num_threads(1)
    store, target = Store(plan.out), Store(f"{plan.out}-plain-{number}")
    stages = [build_stage(name, plan.recipe) for name in ANNOTATE_STAGES]
    duplicates = DuplicatesBySlice(store)
    ledger = Ledger()
    started, rows = 0.0, 0
    for index in range(plan.slices):
        if index == WARM_UP_SLICES:
            ready.wait()
            started = time.perf_counter()
        raw = read_slice(store, read_manifest(store, "raw", index))
        work = Slice(index, tuple(mark_duplicates(raw.samples, duplicates.of(plan.rows_of(index)))))
        done = run_stages(stages, work, ledger, plan.recipe.run.deadline_s)
        write_shard(target, "shard", done, plan.provenance)
        if index >= WARM_UP_SLICES:
            rows += len(done.samples)
    results.put(rows / (time.perf_counter() - started))


def peak_memory(plan: Plan) -> float:
    """Highest sum of unshared memory over this process and its descendants while Ray annotates, in bytes."""
    peak = 0.0
    finished = threading.Event()

    def sample() -> None:
        nonlocal peak
        me = psutil.Process()
        while not finished.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)

    with cluster.connected(None):
        thread = threading.Thread(target=sample)
        thread.start()
        run.annotate(plan, plan.recipe.run, Store(plan.out), UNKNOWN)
        finished.set()
        thread.join()
    return peak


if __name__ == "__main__":
    main()
