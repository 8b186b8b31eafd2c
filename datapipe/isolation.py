"""Keeps a bad row from harming its neighbors, whether it raises, exhausts memory, hangs, or kills its process.

After an exception, the batch is halved until the bad row is alone. A death costs more, because the next process loads
the models again: before a batch runs, it is entered in a `Ledger` that outlives the worker, so that the worker's
successor knows which batch was deadly and runs the rows of that one by themselves. The next death has one culprit. The
numerical results of the other batches do not change.

Batches that overlap, or that take much less time than their entries would, are entered together, and then the first
death only ends that: the slice is done again one batch at a time.
"""

from __future__ import annotations

import faulthandler
import itertools
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from datapipe.ledger import Batch, LedgerClient, Tally
from datapipe.schema import Outcome, Reason, Sample, StageName
from datapipe.spill import Spill
from datapipe.stages.stage import Overlapping, Stage, WaitsForTheLast, is_due
from datapipe.tuning import frees_memory
from subject_diffusion.errors import one_line

DEATHS_OF_A_ROW = 2
"""A row fails when it was under way at this many deaths of its worker, once by itself, because a single death could be
a lost node."""

ENTRY_S = 1.0
"""Quick micro-batches are entered together, as many as take this long: an entry costs processor time of a millisecond
or two, and all workers' go to one ledger."""

BATCH_BYTES = 512 << 20
"""Images of a micro-batch, encoded and decoded, unless a single one is larger: 200 of 1024 x 768 pixels, 14 of 12
megapixels."""

STDERR = 2
"""The descriptor: `sys.stderr` may be an object that has none."""


def run_stage(
    stage: Stage,
    samples: Sequence[Sample],
    *,
    slice_index: int,
    ledger: LedgerClient,
    deaths: Counter[tuple[StageName, Batch]],
    deadline_s: float,
    at_once: int = 1,
    spill: Spill | None = None,
) -> list[Sample]:
    """Runs a stage over the samples that are due; the others pass through. Keeps the order.

    A micro-batch that takes longer than `deadline_s`, the wait for the model included, ends the process, and so counts
    as deadly. `at_once`: how many micro-batches may be under way together, each in a thread of its own, if the stage is
    `Overlapping` and no worker has died in the slice. `spill`: where the slice's images are held.
    """
    held = spill or Spill()
    batches = list(_micro_batches(stage, samples))
    batch_of = {row: rows for rows in map(_rows, batches) for row in rows}
    done: dict[int, Sample] = {}
    tally = Tally()
    seen, tail_s = time.monotonic(), _tail_s(stage)

    def attempt(part: list[Sample]) -> _Attempt:
        rows = _rows(part)
        if len(rows) == 1 and (died := _deaths_of(stage.name, rows, batch_of[rows[0]], deaths)) >= DEATHS_OF_A_ROW:
            why = f"the worker died {died} times on this row, the last time on it alone"
            return _Attempt([part[0].failed(stage.name, Reason.KILLED_WORKER, why)])
        halved_by: list[str] = []
        with deadlines.ends_in(deadline_s):
            return _Attempt(held.through(lambda given: _attempt(stage, given, halved_by), part), halved_by)

    def begin(rows: Batch) -> None:
        ledger.begin(slice_index, stage.name, rows, tally)

    def per_entry() -> int:
        if deaths or tally.failed == tally.rows:  # A stage that has only failed may end the run at the next entry.
            return 1
        return max(1, int(ENTRY_S * tally.batches / max(tally.busy_s, 1e-9)))

    together = at_once if isinstance(stage, Overlapping) and not deaths else 1
    for attempted in _overlapped(attempt, _parts(stage, batches, deaths), begin, per_entry, together):
        _note_failure(attempted.results, stage.name, ledger)
        done.update((s.row, s) for s in attempted.results)
        before, seen = seen, time.monotonic()
        tail_before, tail_s = tail_s, _tail_s(stage)
        tally += _counted(attempted.results, seen - before, attempted.halved_by, tail_s - tail_before)
    ledger.end(slice_index, stage.name, tally)
    return [done.get(s.row, s) for s in samples]


@dataclass(frozen=True)
class _Attempt:
    """The results of a micro-batch, and the errors of its halving, as `_attempt` gives them."""

    results: list[Sample]
    halved_by: Sequence[str] = ()


def _overlapped(
    attempt: Callable[[list[Sample]], _Attempt],
    parts: Iterable[list[Sample]],
    begin: Callable[[Batch], None],
    per_entry: Callable[[], int],
    at_once: int,
) -> Iterator[_Attempt]:
    """Attempts the parts in threads, up to `at_once` together; yields as they finish. Before a part starts, `begin` is
    told the rows of all that are under way and of the next `per_entry` ones, unless it was told of them in the last
    `ENTRY_S`."""
    threads = ThreadPoolExecutor(at_once)
    under_way: dict[Future[_Attempt], Batch] = {}
    waiting, entered, entered_at = deque(parts), 0, 0.0
    try:
        while waiting or under_way:
            while waiting and len(under_way) < at_once:
                if not entered or time.monotonic() - entered_at > ENTRY_S:
                    entered = per_entry()
                    coming = map(_rows, itertools.islice(waiting, entered))
                    begin(tuple(itertools.chain(*under_way.values(), *coming)))
                    entered_at = time.monotonic()
                entered -= 1
                part = waiting.popleft()
                under_way[threads.submit(attempt, part)] = _rows(part)
            for finished in wait(under_way, return_when=FIRST_COMPLETED).done:
                del under_way[finished]
                yield finished.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _parts(
    stage: Stage, batches: Iterable[list[Sample]], deaths: Counter[tuple[StageName, Batch]]
) -> Iterator[list[Sample]]:
    """The micro-batches; of those that were deadly, each row by itself."""
    for batch in batches:
        if deaths[stage.name, _rows(batch)]:
            yield from ([sample] for sample in batch)
        else:
            yield batch


def _deaths_of(stage: StageName, row: Batch, batch: Batch, deaths: Counter[tuple[StageName, Batch]]) -> int:
    """How many deaths a row that died by itself was under way at, alone and in its micro-batch. What else was entered
    together with it may have been done before, or not begun."""
    return sum(deaths[stage, rows] for rows in {row, batch}) if deaths[stage, row] else 0


def _rows(part: Iterable[Sample]) -> Batch:
    return tuple(s.row for s in part)


def _micro_batches(stage: Stage, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Depends on nothing but the slice, so that a resumed run computes exactly what an uninterrupted one would."""
    buckets: dict[object, list[Sample]] = {}
    for sample in samples:
        if is_due(stage, sample):
            buckets.setdefault(stage.bucket(sample), []).append(sample)
    for members in buckets.values():
        batch: list[Sample] = []
        for sample in members:
            full = len(batch) == stage.micro_batch or sum(map(_bytes_of, (*batch, sample))) > BATCH_BYTES
            if batch and full:
                yield batch
                batch = []
            batch.append(sample)
        yield batch


def _bytes_of(sample: Sample) -> int:
    """Memory that an image takes, encoded and decoded."""
    return len(sample.image or b"") + 3 * sample.width * sample.height


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


def _tail_s(stage: Stage) -> float:
    return stage.tail_s if isinstance(stage, WaitsForTheLast) else 0.0


def _counted(results: Iterable[Sample], busy_s: float, halved_by: Sequence[str], tail_s: float) -> Tally:
    verdicts = [s.verdict for s in results]
    failed_by = Counter(v.reason for v in verdicts if v and v.reason and v.outcome is Outcome.FAILED)
    empty_by = Counter(s.verdict.reason for s in results if s.verdict and s.verdict.reason and _is_empty(s))
    return Tally(
        len(verdicts),
        sum(v is not None and v.outcome is Outcome.DROPPED for v in verdicts),
        failed_by.total(),
        busy_s,
        batches=1,
        halved=int(bool(halved_by)),
        halved_by=halved_by[-1] if halved_by else "",
        tail_s=tail_s,
        failed_by=dict(failed_by),
        empty_by=dict(empty_by),
    )


def _is_empty(sample: Sample) -> bool:
    """Whether a model gave nothing for a row: of a few rows their own fault, of nearly all of them the model's. Too few
    tags or boxes are another thing, on which the recipe decides."""
    reason = sample.verdict.reason if sample.verdict else None
    return (
        reason is Reason.NO_CAPTION
        or (reason is Reason.TOO_FEW_TAGS and not sample.tags)
        or (reason is Reason.TOO_FEW_BOXES and not sample.candidates)
    )


class _Deadlines:
    """Ends the process, with all threads' tracebacks on stderr, when a block takes too long. faulthandler's thread
    watches: it needs no interpreter lock, which native code that hangs may hold. It knows one time, the earliest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[object, float] = {}

    @contextmanager
    def ends_in(self, seconds: float) -> Iterator[Callable[[], None]]:
        """Gives a function that grants the block so many seconds more from when it is called."""
        block = object()

        def begin() -> None:
            with self._lock:
                self._ends[block] = time.monotonic() + seconds
                self._watch()

        begin()
        try:
            yield begin
        finally:
            with self._lock:
                del self._ends[block]
                self._watch()

    def _watch(self) -> None:
        if self._ends:
            left = min(self._ends.values()) - time.monotonic()
            faulthandler.dump_traceback_later(max(left, 0.001), exit=True, file=STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()


deadlines = _Deadlines()
