"""A whole run: recipe -> plan -> Ray Data -> committed shards. Two phases, each resumable alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import Dataset
from ray.exceptions import RayError

from datapipe import cluster, progress
from datapipe.deduplicate import DuplicatesBySlice, find_all_duplicates
from datapipe.errors import RunError
from datapipe.isolation import Ledger
from datapipe.plan import Plan, check_folder, claim_folder, make_plan
from datapipe.recipe import ANNOTATE_STAGES, Recipe, check_stages
from datapipe.schema import StageName
from datapipe.shards import Store, read_manifest
from datapipe.sources import Source
from datapipe.workers import AnnotateWorker, FetchWorker

WAVE = 5000
"""Slices handed to Ray Data at once: bounds what the driver holds, however long the input."""


def run(recipe: Recipe, source: Source, out: str, address: str | None = None) -> bool:
    """Makes every missing shard of `out`; returns whether there was anything to do.

    `address`: of a Ray cluster; none starts Ray in this process. Raises SddError, before any work where it can be
    known.
    """
    store = Store(out)
    with store.lock():
        store.clear_temporaries()
        plan = make_plan(recipe, source, store)
        check_folder(plan, store)
        if not plan.missing(store, "shard"):
            return False
        check_stages(recipe)
        with cluster.connected(address):
            claim_folder(plan, store)
            fetch(plan, store)
            find_all_duplicates(store, recipe.screen)
            annotate(plan, store)
    return True


def fetch(plan: Plan, store: Store) -> None:
    """Input rows -> raw shards: every row downloaded and screened by itself."""
    settings = plan.recipe.run
    missing = plan.missing(store, "raw")
    if not missing:
        return
    workers = settings.fetch_workers or cluster.workers_that_fit(settings.fetch_cpus)
    rows = sum(len(plan.rows_of(i)) for i in missing)
    with _ledger(store, (StageName.FETCH, StageName.SCREEN), rows) as ledger:
        for wave in _waves({"slice": index} for index in missing):
            wave = wave.map(
                FetchWorker,
                fn_constructor_kwargs={"plan": plan, "ledger": ledger},
                compute=cluster.pool_of(min(workers, len(missing))),
                num_cpus=settings.fetch_cpus,
            )
            cluster.drain(wave)


def annotate(plan: Plan, store: Store) -> None:
    """Raw shards -> shards of captioned, grounded, segmented and selected entities."""
    missing = plan.missing(store, "shard")
    pools = plan.recipe.run.pools
    duplicates = DuplicatesBySlice(store, plan.recipe.slice_rows)
    alive = sum(read_manifest(store, "raw", index).counts.get("fetched", 0) for index in missing)
    with _ledger(store, ANNOTATE_STAGES, alive) as ledger:
        for wave in _waves({"slice": index, "duplicates": duplicates.of(index)} for index in missing):
            for pool in pools:
                workers = pool.workers or cluster.workers_that_fit(pool.cpus * len(pools), pool.gpus * len(pools))
                wave = wave.map(
                    AnnotateWorker,
                    fn_constructor_kwargs={"plan": plan, "pool": pool, "ledger": ledger},
                    compute=cluster.pool_of(min(workers, len(missing))),
                    num_cpus=pool.cpus,
                    num_gpus=pool.gpus,
                )
            cluster.drain(wave)


@contextmanager
def _ledger(store: Store, stages: Sequence[StageName], rows: int) -> Iterator[Any]:
    """The ledger of a phase in an actor of its own, and its tallies on the screen and in the folder. `rows`: that will
    enter the first stage."""
    ledger = ray.remote(num_cpus=0)(Ledger).remote()
    started = time.monotonic()
    try:
        with progress.shown(stages, rows, lambda: ray.get(ledger.progress.remote())):
            yield ledger
        progress.record(store, ray.get(ledger.progress.remote()), time.monotonic() - started)
    except RayError:
        problem = ray.get(ledger.problem.remote())
        if problem is None:
            raise
        raise RunError(problem) from None


def _waves(rows: Iterable[dict[str, Any]]) -> Iterator[Dataset]:
    rows = iter(rows)
    while wave := list(itertools.islice(rows, WAVE)):
        yield ray.data.from_items(wave, override_num_blocks=len(wave))
