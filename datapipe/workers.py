"""What runs inside Ray's actors: a slice in, its stages in turn, a committed shard (or the slice, on to the next
pool) out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from datapipe.deduplicate import DuplicatesOfSlice, mark_duplicates
from datapipe.errors import SddError
from datapipe.isolation import Batch, LedgerClient, Stage, Tally, run_stage
from datapipe.plan import Plan
from datapipe.recipe import ANNOTATE_STAGES, Pool, build_stage
from datapipe.schema import Slice, StageName, slice_from_ipc, slice_to_ipc
from datapipe.shards import Store, read_manifest, read_slice, write_shard

Row = dict[str, Any]
"""A row of the Ray dataset, always one whole slice, for Ray Data may split and merge blocks but never rows."""


class RemoteLedger:
    """The ledger in its own actor. Every call waits: what is written must be there before the worker can die."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def open(self, slice_index: int, first: StageName) -> Counter[tuple[StageName, Batch]]:
        deaths: Counter[tuple[StageName, Batch]] = ray.get(self._actor.open.remote(slice_index, first))
        return deaths

    def begin(self, slice_index: int, stage: StageName, batch: Batch, before: Tally) -> None:
        ray.get(self._actor.begin.remote(slice_index, stage, batch, before))

    def end(self, slice_index: int, stage: StageName, tally: Tally) -> None:
        ray.get(self._actor.end.remote(slice_index, stage, tally))

    def close(self, slice_index: int) -> None:
        ray.get(self._actor.close.remote(slice_index))

    def stop(self, problem: str) -> None:
        ray.get(self._actor.stop.remote(problem))

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Errors that are the user's to mend end the run; what they say goes into the ledger first."""
        try:
            yield
        except SddError as error:
            self.stop(str(getattr(error, "cause", error)))
            raise


def run_stages(stages: Sequence[Stage], work: Slice, ledger: LedgerClient, deadline_s: float) -> Slice:
    """Every stage in turn over one slice."""
    deaths = ledger.open(work.index, stages[0].name)
    samples = list(work.samples)
    for stage in stages:
        samples = run_stage(stage, samples, slice_index=work.index, ledger=ledger, deaths=deaths, deadline_s=deadline_s)
    return Slice(work.index, tuple(samples))


class FetchWorker:
    """Downloads and screens one slice and commits it as a raw shard."""

    def __init__(self, plan: Plan, ledger: Any) -> None:
        self.plan, self.ledger = plan, RemoteLedger(ledger)
        self.store = Store(plan.out)
        self.stages = [build_stage(name, plan.recipe) for name in (StageName.FETCH, StageName.SCREEN)]

    def __call__(self, row: Row) -> Row:
        with self.ledger.noting_errors():
            index = row["slice"]
            rows = self.plan.rows_of(index)
            work = Slice(index, tuple(self.plan.source.read(rows.start, rows.stop)))
            done = run_stages(self.stages, work, self.ledger, self.plan.recipe.run.deadline_s)
            write_shard(self.store, "raw", done, self.plan.provenance)
            self.ledger.close(index)
            return {"slice": index}


class AnnotateWorker:
    """Runs the stages of one pool over slices; the first pool reads raw shards, the last one commits."""

    def __init__(self, plan: Plan, pool: Pool, ledger: Any) -> None:
        _use_one_thread()
        self.plan, self.ledger = plan, RemoteLedger(ledger)
        self.store = Store(plan.out)
        self.stages = [build_stage(name, plan.recipe) for name in pool.stages]
        self.reads = pool.stages[0] == ANNOTATE_STAGES[0]
        self.commits = pool.stages[-1] == ANNOTATE_STAGES[-1]

    def __call__(self, row: Row) -> Row:
        with self.ledger.noting_errors():
            index = row["slice"]
            work = self._read(index, row["duplicates"]) if self.reads else slice_from_ipc(row["data"])
            done = run_stages(self.stages, work, self.ledger, self.plan.recipe.run.deadline_s)
            if not self.commits:
                return {"slice": index, "data": slice_to_ipc(done)}
            write_shard(self.store, "shard", done, self.plan.provenance)
            self.ledger.close(index)
            return {"slice": index}

    def _read(self, index: int, duplicates: DuplicatesOfSlice) -> Slice:
        raw = read_slice(self.store, read_manifest(self.store, "raw", index))
        return Slice(index, tuple(mark_duplicates(raw.samples, duplicates)))


def _use_one_thread() -> None:
    """More cores mean more actors; and sums come out the same however many there are."""
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
