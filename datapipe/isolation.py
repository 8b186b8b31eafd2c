"""Keeps a bad row from taking its neighbours along, whether it raises, exhausts memory, hangs, or kills its process.

Exceptions are met by halving the batch until the row stands alone. Deaths of the process are met the same way, across
processes: before a batch runs it is written into a `Ledger` that outlives the worker, so that the worker's successor
knows which batch was deadly and halves that one. Numerics of the other batches stay as they were.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from datapipe.errors import RunError
from datapipe.schema import Outcome, Reason, Sample, StageName

SOLITARY_DEATHS = 2
"""A row must kill its worker this often, alone, before it is given up: once could be a node that went away."""

RESTARTS_OUTSIDE_STAGES = 3
"""A slice whose worker dies this often while no batch is under way (reading, committing) ends the run."""

DEADLINE_EXIT_CODE = 70


class Stage(Protocol):
    """One step over samples, as a plain object that knows no Ray, no path and no clock."""

    name: StageName
    micro_batch: int
    """How many samples one call takes at most."""

    def bucket(self, sample: Sample) -> object:
        """Samples of one bucket may share a micro-batch (say: images of the same padded size)."""

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples in the same order, each further on or with a verdict."""


Batch = tuple[int, ...]
"""The rows of a micro-batch, in order."""


@dataclass(frozen=True)
class Tally:
    """What a stage did with a slice so far: rows that came in, what became of them there, and the seconds that took,
    added up over all workers."""

    rows: int = 0
    dropped: int = 0
    failed: int = 0
    busy_s: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.rows + other.rows,
            self.dropped + other.dropped,
            self.failed + other.failed,
            self.busy_s + other.busy_s,
        )


class LedgerClient(Protocol):
    """The side of the ledger that a worker writes."""

    def open(self, slice_index: int, first: StageName) -> Counter[tuple[StageName, Batch]]: ...

    def begin(self, slice_index: int, stage: StageName, batch: Batch, before: Tally) -> None: ...

    def end(self, slice_index: int, stage: StageName, tally: Tally) -> None: ...

    def close(self, slice_index: int) -> None: ...

    def stop(self, problem: str) -> None: ...


@dataclass
class Ledger:
    """What the workers are about to do and have done; it outlives them."""

    under_way: dict[int, tuple[StageName, Batch]] = field(default_factory=dict)
    deaths: dict[int, Counter[tuple[StageName, Batch]]] = field(default_factory=dict)
    tallies: dict[tuple[StageName, int], Tally] = field(default_factory=dict)
    opened: Counter[tuple[int, StageName]] = field(default_factory=Counter)
    stopped_by: str | None = None

    def open(self, slice_index: int, first: StageName) -> Counter[tuple[StageName, Batch]]:
        """Starts (or, after a death, restarts) a slice at stage `first`; returns how often each of its batches was
        deadly."""
        deaths = self.deaths.setdefault(slice_index, Counter())
        if (deadly := self.under_way.pop(slice_index, None)) is not None:
            deaths[deadly] += 1
        else:
            self.opened[slice_index, first] += 1
            if self.opened[slice_index, first] > 1 + RESTARTS_OUTSIDE_STAGES:
                raise RunError(
                    f"slice {slice_index}: its worker keeps dying outside of any stage; see the worker's log"
                )
        return deaths

    def begin(self, slice_index: int, stage: StageName, batch: Batch, before: Tally) -> None:
        """`batch` is about to run, and the one before it is done. `before`: the stage's tally without `batch`."""
        self.under_way[slice_index] = (stage, batch)
        self.tallies[stage, slice_index] = before

    def end(self, slice_index: int, stage: StageName, tally: Tally) -> None:
        """The stage is done with the slice."""
        self.under_way.pop(slice_index, None)
        self.tallies[stage, slice_index] = tally

    def close(self, slice_index: int) -> None:
        self.under_way.pop(slice_index, None)
        self.deaths.pop(slice_index, None)

    def stop(self, problem: str) -> None:
        """Notes the first error that ends the run: of Ray's own exceptions only the text of a traceback comes back."""
        self.stopped_by = self.stopped_by or problem

    def problem(self) -> str | None:
        return self.stopped_by

    def progress(self) -> dict[StageName, Tally]:
        """Sums over the slices, by stage."""
        sums: dict[StageName, Tally] = {}
        for (stage, _), tally in self.tallies.items():
            sums[stage] = sums.get(stage, Tally()) + tally
        return sums


def run_stage(
    stage: Stage,
    samples: Sequence[Sample],
    *,
    slice_index: int,
    ledger: LedgerClient,
    deaths: Counter[tuple[StageName, Batch]],
    deadline_s: float,
) -> list[Sample]:
    """Runs a stage over the samples still under way; the others pass through. The order is kept.

    A micro-batch that takes longer than `deadline_s` ends the process, and so counts as deadly.
    """
    done: dict[int, Sample] = {}
    tally = Tally()
    for batch in _micro_batches(stage, samples):
        pending = [batch]
        while pending:
            part = pending.pop(0)
            rows = tuple(s.row for s in part)
            deadly = deaths[stage.name, rows]
            started = time.monotonic()
            if deadly and len(part) > 1:
                pending[:0] = _halves(part)
                continue
            if deadly >= SOLITARY_DEATHS:
                results = [
                    part[0].failed(
                        stage.name, Reason.KILLED_WORKER, f"the worker died {deadly} times on this row alone"
                    )
                ]
            else:
                ledger.begin(slice_index, stage.name, rows, tally)
                with _deadline(deadline_s, stage.name, rows):
                    results = _attempt(stage, part)
            done.update((s.row, s) for s in results)
            tally += _counted(results, time.monotonic() - started)
    ledger.end(slice_index, stage.name, tally)
    return [done.get(s.row, s) for s in samples]


def _micro_batches(stage: Stage, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Fixed by the slice alone, so that a resumed run computes exactly what an undisturbed one would."""
    buckets: dict[object, list[Sample]] = {}
    for sample in samples:
        if sample.verdict is None:
            buckets.setdefault(stage.bucket(sample), []).append(sample)
    for members in buckets.values():
        for start in range(0, len(members), stage.micro_batch):
            yield members[start : start + stage.micro_batch]


def _halves(batch: list[Sample]) -> list[list[Sample]]:
    middle = (len(batch) + 1) // 2
    return [batch[:middle], batch[middle:]]


def _attempt(stage: Stage, batch: list[Sample]) -> list[Sample]:
    # Isolation is the purpose here: whatever a row raises becomes that row's verdict.
    try:
        results = stage(batch)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            sys.modules["torch"].cuda.empty_cache()
        if len(batch) > 1:
            return [s for half in _halves(batch) for s in _attempt(stage, half)]
        return [batch[0].failed(stage.name, Reason.ERROR, _one_line(error))]
    if [s.row for s in results] != [s.row for s in batch]:
        raise RuntimeError(f"stage {stage.name.value} must return the samples it was given, in order")
    return results


def _one_line(error: Exception) -> str:
    """Without addresses, which would differ from run to run."""
    text = re.sub(r"0x[0-9a-f]+", "0x…", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:300]


def _counted(results: Iterable[Sample], busy_s: float) -> Tally:
    outcomes = [s.verdict.outcome if s.verdict else None for s in results]
    return Tally(len(outcomes), outcomes.count(Outcome.DROPPED), outcomes.count(Outcome.FAILED), busy_s)


@contextmanager
def _deadline(seconds: float, stage: StageName, rows: Batch) -> Iterator[None]:
    def give_up() -> None:
        print(f"{stage.value}: rows {rows} took longer than {seconds:g} s; ending this worker", file=sys.stderr)
        faulthandler.dump_traceback()
        os._exit(DEADLINE_EXIT_CODE)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
