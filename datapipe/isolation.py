"""Keeps a bad row from harming its neighbors, whether it raises, exhausts memory, hangs, or kills its process.

After an exception, the batch is halved until the bad row is alone. After the death of a process the same happens across
processes: before a batch runs, it is entered in a `Ledger` that outlives the worker, so that the worker's successor
knows which batch was deadly and halves that one. The numerical results of the other batches do not change.

Where batches overlap, all that are under way are entered together, and a death then accuses none of them: the slice is
done again one batch at a time, and the next death has one culprit.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from datapipe.batch_size import frees_memory
from datapipe.ledger import Batch, LedgerClient, Tally
from datapipe.schema import Outcome, Reason, Sample, StageName
from datapipe.stages.stage import Overlapping, Stage
from subject_diffusion.errors import one_line

SOLITARY_DEATHS = 2
"""A row must kill its worker this often, alone, before it fails, because a single death could be a lost node."""

DEADLINE_EXIT_CODE = 70


def run_stage(
    stage: Stage,
    samples: Sequence[Sample],
    *,
    slice_index: int,
    ledger: LedgerClient,
    deaths: Counter[tuple[StageName, Batch]],
    deadline_s: float,
    at_once: int = 1,
) -> list[Sample]:
    """Runs a stage over the samples that have no verdict yet; the others pass through. Keeps the order.

    A micro-batch that takes longer than `deadline_s`, the wait for the model included, ends the process, and so counts
    as deadly. `at_once`: how many micro-batches may be under way together, each in a thread of its own, if the stage is
    `Overlapping` and no worker has died in the slice.
    """
    done: dict[int, Sample] = {}
    tally = Tally()
    seen = time.monotonic()

    def attempt(part: list[Sample]) -> _Attempt:
        rows = _rows(part)
        if (deadly := deaths[stage.name, rows]) >= SOLITARY_DEATHS:
            why = f"the worker died {deadly} times on this row alone"
            return _Attempt([part[0].failed(stage.name, Reason.KILLED_WORKER, why)])
        halved_by: list[str] = []
        with _deadline(deadline_s, stage.name, rows):
            return _Attempt(_attempt(stage, part, halved_by), halved_by)

    def begin(rows: Batch) -> None:
        ledger.begin(slice_index, stage.name, rows, tally)

    parts = _parts(stage, samples, deaths)
    for attempted in _overlapped(attempt, parts, begin, 1 if deaths or not isinstance(stage, Overlapping) else at_once):
        _note_failure(attempted.results, stage.name, ledger)
        done.update((s.row, s) for s in attempted.results)
        before, seen = seen, time.monotonic()
        tally += _counted(attempted.results, seen - before, attempted.halved_by)
    ledger.end(slice_index, stage.name, tally)
    return [done.get(s.row, s) for s in samples]


@dataclass(frozen=True)
class _Attempt:
    """The results of a micro-batch, and the errors of its halving, as `_attempt` gives them."""

    results: list[Sample]
    halved_by: Sequence[str] = ()


def _overlapped(
    attempt: Callable[[list[Sample]], _Attempt],
    parts: Iterator[list[Sample]],
    begin: Callable[[Batch], None],
    at_once: int,
) -> Iterator[_Attempt]:
    """Attempts the parts in threads, up to `at_once` together; yields as they finish. `begin` is told all rows under
    way before a part starts."""
    threads = ThreadPoolExecutor(at_once)
    under_way: dict[Future[_Attempt], Batch] = {}
    try:
        while True:
            for part in itertools.islice(parts, at_once - len(under_way)):
                begin(tuple(itertools.chain(*under_way.values(), _rows(part))))
                under_way[threads.submit(attempt, part)] = _rows(part)
            if not under_way:
                return
            for finished in wait(under_way, return_when=FIRST_COMPLETED).done:
                del under_way[finished]
                yield finished.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _parts(stage: Stage, samples: Sequence[Sample], deaths: Counter[tuple[StageName, Batch]]) -> Iterator[list[Sample]]:
    """The micro-batches, those that were deadly in halves."""
    for batch in _micro_batches(stage, samples):
        pending = [batch]
        while pending:
            part = pending.pop(0)
            if len(part) > 1 and deaths[stage.name, _rows(part)]:
                pending[:0] = _halves(part)
            else:
                yield part


def _rows(part: Iterable[Sample]) -> Batch:
    return tuple(s.row for s in part)


def _micro_batches(stage: Stage, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Depends on nothing but the slice, so that a resumed run computes exactly what an uninterrupted one would."""
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


def _attempt(stage: Stage, batch: list[Sample], halved_by: list[str]) -> list[Sample]:
    """`halved_by` gets the error of every batch that got through in parts, and so did not fail for a row of it."""
    # Isolation is the purpose here: any exception that a row raises becomes that row's verdict.
    try:
        results = stage(batch)
    except Exception as error:
        frees_memory(error)
        if len(batch) > 1:
            done = [s for half in _halves(batch) for s in _attempt(stage, half, halved_by)]
            if not any(s.verdict and s.verdict.outcome is Outcome.FAILED for s in done):
                halved_by.append(_told(error))
            return done
        return [batch[0].failed(stage.name, Reason.ERROR, _told(error))]
    if [s.row for s in results] != [s.row for s in batch]:
        raise RuntimeError(f"stage {stage.name.value} must return the samples it was given, in order")
    return results


def _note_failure(results: Iterable[Sample], stage: StageName, ledger: LedgerClient) -> None:
    """Tells the ledger of the first row that failed, so that a stage that fails for all can say why."""
    for sample in results:
        if sample.verdict is not None and sample.verdict.outcome is Outcome.FAILED:
            assert sample.verdict.reason is not None
            ledger.failed(stage, sample.verdict.detail or sample.verdict.reason.value)
            return


def _told(error: Exception) -> str:
    """Without addresses, which would differ from run to run."""
    text = re.sub(r"0x[0-9a-f]+", "0x…", one_line(error, 300))
    return f"{type(error).__name__}: {text}"[:300]


def _counted(results: Iterable[Sample], busy_s: float, halved_by: Sequence[str]) -> Tally:
    outcomes = [s.verdict.outcome if s.verdict else None for s in results]
    return Tally(
        len(outcomes),
        outcomes.count(Outcome.DROPPED),
        outcomes.count(Outcome.FAILED),
        busy_s,
        batches=1,
        halved=int(bool(halved_by)),
        halved_by=halved_by[-1] if halved_by else "",
    )


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
