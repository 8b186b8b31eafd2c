"""What runs inside Ray's actors: a slice comes in and goes through the stages; a committed shard comes out, or the
slice for the next pool."""

from __future__ import annotations

import math
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from datapipe.decoded import decoded_once
from datapipe.deduplicate import mark_duplicates
from datapipe.isolation import deadlines, run_stage
from datapipe.ledger import Batch, LedgerClient, Tally
from datapipe.plan import Plan
from datapipe.recipe import Pool, Recipe, build_stage
from datapipe.schema import Slice, StageName, slice_from_ipc, slice_to_ipc
from datapipe.shards import Kind, Store, manifest_name, read_manifest, read_slice, write_shard
from datapipe.spill import Spill, loaded
from datapipe.stages import ANNOTATE_STAGES, FETCH_STAGES
from datapipe.stages.fetch import FetchStage
from datapipe.stages.stage import Stage
from subject_diffusion.errors import SddError, one_line

Row = dict[str, Any]
"""A row of the Ray dataset: always one whole slice, because Ray Data may split and merge blocks but never rows."""


class RemoteLedger:
    """The ledger in its own actor. Every call waits, because an entry must be there before the worker can die."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._failing: set[StageName] = set()

    def start(self, kind: Kind) -> None:
        ray.get(self._actor.start.remote(kind))

    def open(self, slice_index: int, first: StageName) -> Counter[tuple[StageName, Batch]]:
        deaths: Counter[tuple[StageName, Batch]] = ray.get(self._actor.open.remote(slice_index, first))
        return deaths

    def begin(self, slice_index: int, stage: StageName, batch: Batch, before: Tally) -> None:
        ray.get(self._actor.begin.remote(slice_index, stage, batch, before))

    def end(self, slice_index: int, stage: StageName, tally: Tally) -> None:
        ray.get(self._actor.end.remote(slice_index, stage, tally))

    def failed(self, stage: StageName, why: str) -> None:
        if stage not in self._failing:  # It wants the first one only.
            self._failing.add(stage)
            ray.get(self._actor.failed.remote(stage, why))

    def close(self, kind: Kind, slice_index: int) -> bool:
        may_stay: bool = ray.get(self._actor.close.remote(kind, slice_index))
        return may_stay

    def stop(self, problem: str) -> None:
        ray.get(self._actor.stop.remote(problem))

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Ends the run at any error outside of a row, after one line about it has gone into the ledger. The traceback
        goes into the worker's log."""
        try:
            yield
        except SddError as error:
            self.stop(str(getattr(error, "cause", error)))
            raise
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}, line {at.lineno}"
            self.stop(f"a worker failed: {type(error).__name__}: {one_line(error)} ({where}); more in Ray's logs")
            raise


def run_stages(
    stages: Sequence[Stage],
    work: Slice,
    ledger: LedgerClient,
    deadline_s: float,
    at_once: int = 1,
    spill: Spill | None = None,
    deaths: Counter[tuple[StageName, Batch]] | None = None,
) -> Slice:
    """Takes a slice through the stages; see `run_stage`. deaths: where the ledger has the slice open already, what it
    answered; default: it is opened here."""
    if deaths is None:
        deaths = ledger.open(work.index, stages[0].name)
    samples = list(work.samples)
    with decoded_once(stages):
        for stage in stages:
            samples = run_stage(
                stage,
                samples,
                slice_index=work.index,
                ledger=ledger,
                deaths=deaths,
                deadline_s=deadline_s,
                at_once=at_once,
                spill=spill,
            )
    return Slice(work.index, tuple(samples))


class FetchWorker:
    """Downloads and screens one slice and commits it as a raw shard."""

    def __init__(self, plan: Plan, ledger: Any) -> None:
        self.plan, self.ledger = plan, RemoteLedger(ledger)
        with self.ledger.noting_errors():
            self.ledger.start("raw")
            self.store = Store(plan.out)
            self.stages = _build_stages(FETCH_STAGES, plan.recipe)

    def __call__(self, row: Row) -> Row:
        with self.ledger.noting_errors():
            index, spill, deadline_s = row["slice"], Spill(), self.plan.recipe.run.deadline_s
            # An earlier run fetched it, or an actor that died, or lost its node, before it could say so.
            if self.store.exists(manifest_name("raw", index)):
                return row
            # Before the slice is read: a decoder of videos may kill the worker, too.
            deaths = self.ledger.open(index, self.stages[0].name)
            for stage in self.stages:
                if isinstance(stage, FetchStage):
                    stage.hold = spill.hold
            work = self._read(index, spill, deadline_s)
            done = run_stages(self.stages, work, self.ledger, deadline_s, spill=spill, deaths=deaths)
            _commit(self.store, "raw", done, self.plan, self.ledger)
            return row

    def _read(self, index: int, spill: Spill, deadline_s: float) -> Slice:
        """A slice of the input. Each image that comes along may take `deadline_s`."""
        with deadlines.ends_in(deadline_s) as begin_anew:

            def hold(image: bytes) -> bytes:
                begin_anew()
                return spill.hold(image)

            return Slice(index, tuple(self.plan.read(index, hold)))


class AnnotateWorker:
    """Takes slices through the stages of one pool. The first pool reads raw shards, the last one commits."""

    def __init__(self, plan: Plan, pool: Pool, ledger: Any) -> None:
        use_one_thread()
        self.plan, self.ledger = plan, RemoteLedger(ledger)
        with self.ledger.noting_errors():
            self.ledger.start("shard")
            self.store = Store(plan.out)
            self.stages = _build_stages(pool.stages, plan.recipe)
        self.reads = pool.stages[0] == ANNOTATE_STAGES[0]
        self.commits = pool.stages[-1] == ANNOTATE_STAGES[-1]
        self.at_once = batches_at_once(pool)

    def __call__(self, row: Row) -> Row:
        with self.ledger.noting_errors():
            index, spill = row["slice"], Spill()
            raw = read_slice(self.store, read_manifest(self.store, "raw", index), spill)
            if self.reads:
                work = Slice(index, tuple(mark_duplicates(raw.samples, row["duplicates"])))
            else:
                work = _with_images(slice_from_ipc(row["data"]), raw)
            done = run_stages(self.stages, work, self.ledger, self.plan.recipe.run.deadline_s, self.at_once, spill)
            if not self.commits:
                return {"slice": index, "data": slice_to_ipc(_without_images(done, raw))}
            _commit(self.store, "shard", done, self.plan, self.ledger)
            return {"slice": index}


def _commit(store: Store, kind: Kind, work: Slice, plan: Plan, ledger: RemoteLedger) -> None:
    manifest = write_shard(store, kind, work, plan.provenance_of(work.index))
    if not ledger.close(kind, work.index):
        store.remove([manifest.file])


def _without_images(work: Slice, raw: Slice) -> Slice:
    """What is handed to the next pool: annotations, and only the images that are not those of the raw shard."""
    pairs = zip(work.samples, raw.samples, strict=True)
    return Slice(work.index, tuple(s.replace(image=None) if s.image is r.image else loaded(s) for s, r in pairs))


def _with_images(work: Slice, raw: Slice) -> Slice:
    """Inverse of `_without_images`."""
    pairs = zip(work.samples, raw.samples, strict=True)
    return Slice(work.index, tuple(s.replace(image=r.image) if s.image is None else s for s, r in pairs))


def _build_stages(names: Sequence[StageName], recipe: Recipe) -> list[Stage]:
    return [build_stage(name, recipe) for name in recipe.with_optional(names)]


def batches_at_once(pool: Pool) -> int:
    """One micro-batch has the GPU while every core of the actor prepares another, or encodes what came of it. Without a
    GPU the models themselves need the cores."""
    return 1 + math.ceil(pool.cpus) if pool.gpus else 1


def use_one_thread() -> None:
    """One thread per actor: more cores mean more actors, and sums do not depend on how many cores there are."""
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
