"""What the workers have done and are about to do, noted where it outlives them: a dead worker's successor learns here
which batch was deadly, and the run whether there is hope."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from datapipe.schema import Reason, StageName
from datapipe.shards import Kind
from subject_diffusion.errors import RunError

RESTARTS_OUTSIDE_STAGES = 3
"""How often a slice is started again after its worker died outside a batch (reading or committing); then the run
ends."""

HOPELESS_AFTER = 32
"""When a stage of `annotate` has failed for this many rows and no row has passed, the run ends, because the fault is
not the rows'."""


MEMORY_DEATHS = 10
"""When Ray's memory monitor has ended this many workers since the last shard was committed, the run ends, because it
would go round in circles."""


Batch = tuple[int, ...]
"""The rows of a micro-batch, in order; or of several, one after another, when they are under way together."""


@dataclass(frozen=True)
class Tally:
    """What a stage has done with a slice so far: the rows that came in, how many of them it dropped and failed, and the
    seconds that this took, summed over all workers. `halved`: how many of its `batches` failed as a whole though none
    of their rows did alone, and the last such error in `halved_by`. `tail_s`: of `busy_s`, see `WaitsForTheLast`.
    `failed_by`: the failed rows by their reason; `empty_by`: of the dropped ones, those for which a model gave nothing
    at all."""

    rows: int = 0
    dropped: int = 0
    failed: int = 0
    busy_s: float = 0.0
    batches: int = 0
    halved: int = 0
    halved_by: str = ""
    tail_s: float = 0.0
    failed_by: Mapping[Reason, int] = field(default_factory=dict)
    empty_by: Mapping[Reason, int] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.rows + other.rows,
            self.dropped + other.dropped,
            self.failed + other.failed,
            self.busy_s + other.busy_s,
            self.batches + other.batches,
            self.halved + other.halved,
            other.halved_by or self.halved_by,
            self.tail_s + other.tail_s,
            dict(Counter(self.failed_by) + Counter(other.failed_by)),
            dict(Counter(self.empty_by) + Counter(other.empty_by)),
        )

    def __sub__(self, other: Tally) -> Tally:
        """What was added to `other`, a part of this one."""
        return Tally(
            self.rows - other.rows,
            self.dropped - other.dropped,
            self.failed - other.failed,
            self.busy_s - other.busy_s,
            self.batches - other.batches,
            self.halved - other.halved,
            self.halved_by,
            self.tail_s - other.tail_s,
            dict(Counter(self.failed_by) - Counter(other.failed_by)),
            dict(Counter(self.empty_by) - Counter(other.empty_by)),
        )

    @property
    def lost_by(self) -> Mapping[Reason, int]:
        """By their reason, the rows whose loss may not be their own fault."""
        return Counter(self.failed_by) + Counter(self.empty_by)


class LedgerClient(Protocol):
    """The ledger as a worker uses it."""

    def start(self, kind: Kind) -> None: ...

    def open(self, slice_index: int, first: StageName) -> Counter[tuple[StageName, Batch]]: ...

    def begin(self, slice_index: int, stage: StageName, batch: Batch, before: Tally) -> None: ...

    def end(self, slice_index: int, stage: StageName, tally: Tally) -> None: ...

    def failed(self, stage: StageName, why: str) -> None: ...

    def close(self, kind: Kind, slice_index: int) -> bool: ...

    def stop(self, problem: str) -> None: ...


@dataclass
class Recent:
    """Why a stage's last rows were lost: `size` of them, or as many more as were noted together."""

    size: int
    noted: deque[tuple[int, Mapping[Reason, int]]] = field(default_factory=deque)
    rows: int = 0
    lost_by: Counter[Reason] = field(default_factory=Counter)

    def note(self, rows: int, lost_by: Mapping[Reason, int]) -> None:
        self.noted.append((rows, lost_by))
        self.rows += rows
        self.lost_by.update(lost_by)
        while self.rows - self.noted[0][0] >= self.size:
            gone, gone_by = self.noted.popleft()
            self.rows -= gone
            self.lost_by.subtract(gone_by)

    def failing(self, share: float, *, full: bool = True) -> tuple[Reason, int] | None:
        """The reason for which more than this share of the window was lost, and how many were; None while the window is
        not full, if it has to be."""
        if (full and self.rows < self.size) or not self.lost_by:
            return None
        (reason, lost) = self.lost_by.most_common(1)[0]
        return (reason, lost) if lost > share * self.rows else None


@dataclass(frozen=True)
class Hopeless:
    """A stage that failed for every row, what is wrong, and the slices that it had."""

    stage: StageName
    what: str
    slices: list[int]


@dataclass
class Ledger:
    """What the workers have done and are about to do. It outlives them."""

    under_way: dict[int, tuple[StageName, Batch]] = field(default_factory=dict)
    deaths: dict[int, Counter[tuple[StageName, Batch]]] = field(default_factory=dict)
    tallies: dict[tuple[StageName, int], Tally] = field(default_factory=dict)
    sums: dict[StageName, Tally] = field(default_factory=dict)
    """Of the tallies, by stage; kept, because they are asked for every second, and there may be 100,000 slices."""
    opened: Counter[tuple[int, StageName]] = field(default_factory=Counter)
    failures: dict[StageName, str] = field(default_factory=dict)
    """Why the first row failed, by stage."""
    works: set[StageName] = field(default_factory=set)
    """The stages through which a row has come."""
    makes: Kind = "shard"
    """Which shards the phase is for."""
    hopeless_after: int = HOPELESS_AFTER
    """How many rows a stage may fail for, without one that it does not fail for."""
    patient_with: frozenset[StageName] = frozenset()
    """Stages that may fail for any number: a list of addresses may begin with a dead host."""
    stop_share: float = 1.0
    stop_rows: int = 1
    """See `RunSettings`."""
    out_of_memory: Callable[[], int] = lambda: 0
    """How many workers Ray's memory monitor has ended so far."""
    _out_of_memory_before: dict[Kind, int] = field(default_factory=dict)
    _closed_before: dict[Kind, int] = field(default_factory=dict)
    _starts: Counter[Kind] = field(default_factory=Counter)
    recent: dict[StageName, Recent] = field(default_factory=dict)
    failing: tuple[StageName, Reason] | None = None
    """The stage that lost more than `stop_share` of its last rows, and for which reason."""
    stopped_by: str | None = None
    ended: bool = False
    """Whether what is committed from now on may not stay."""
    closed: dict[Kind, set[int]] = field(default_factory=lambda: {"raw": set(), "shard": set()})
    """The slices whose shards are committed."""

    def start(self, kind: Kind) -> None:
        """Notes that a worker starts, perhaps in place of one that died. kind: of the shards that it works for."""
        ended, closed = self.out_of_memory(), len(self.closed[kind])
        if closed > self._closed_before.get(kind, -1):
            self._closed_before[kind], self._out_of_memory_before[kind] = closed, ended
            self._starts[kind] = 0
        self._starts[kind] += 1
        lately = ended - self._out_of_memory_before[kind]
        # The workers that Ray ended may have been those of the other kind.
        if min(lately, self._starts[kind] - 1) >= MEMORY_DEATHS:
            raise RunError(
                f"the memory of the nodes does not suffice: Ray ended {lately} workers for it, and no shard was "
                "finished meanwhile; run fewer at a time (run.fetch_workers, run.pools[].workers), or start a dataset "
                "of smaller slices (slice_rows)"
            )

    def open(self, slice_index: int, first: StageName) -> Counter[tuple[StageName, Batch]]:
        """Starts a slice at stage `first`, or, after a death, restarts it there. Returns how often each of its batches
        was deadly."""
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
        """Notes what is under way from now on: `batch`, all that is not done. `before`: the stage's tally without
        it."""
        self.under_way[slice_index] = (stage, batch)
        self._note(stage, slice_index, before)

    def end(self, slice_index: int, stage: StageName, tally: Tally) -> None:
        """Notes that the stage has finished the slice."""
        self.under_way.pop(slice_index, None)
        self._note(stage, slice_index, tally)

    def failed(self, stage: StageName, why: str) -> None:
        """Notes why a row failed."""
        self.failures.setdefault(stage, why)

    def hopeless(self) -> Hopeless | None:
        """A stage that failed for every row that it got, however few."""
        for stage, tally in self.progress().items():
            if tally.rows and tally.failed == tally.rows:
                what = (
                    f"{stage.value}: all of its {tally.rows:,} rows failed, the first because of "
                    f"{self.failures.get(stage, 'its worker')}; nothing was made of them"
                )
                return Hopeless(stage, what, [index for name, index in self.tallies if name is stage])
        return None

    def in_vain(self) -> dict[StageName, list[int]]:
        """Once a stage has stopped the run, the slices that were lost for the most part for its reason; and those of
        other stages that were about to: what takes the network from one may take it from all."""
        if self.failing is None:
            return {}
        reasons = dict([self.failing])
        for stage, recent in self.recent.items():
            if (failing := recent.failing(self.stop_share, full=False)) is not None:
                reasons.setdefault(stage, failing[0])
        lost: dict[StageName, list[int]] = {stage: [] for stage in reasons}
        for (stage, index), tally in self.tallies.items():
            if stage in reasons and 2 * tally.lost_by.get(reasons[stage], 0) > tally.rows:
                lost[stage].append(index)
        return lost

    def _note(self, stage: StageName, slice_index: int, tally: Tally) -> None:
        before = self.tallies.get((stage, slice_index), Tally())
        self.tallies[stage, slice_index] = tally
        self.sums[stage] = self.sums.get(stage, Tally()) + tally - before
        if tally.rows < before.rows:  # A worker died, and the slice begins again.
            before = Tally()
        self._stop_when_hopeless(stage, tally)
        recent = self.recent.setdefault(stage, Recent(self.stop_rows))
        recent.note(tally.rows - before.rows, Counter(tally.lost_by) - Counter(before.lost_by))
        if (failing := recent.failing(self.stop_share)) is not None:
            reason, lost = failing
            self.failing = stage, reason
            how = "were dropped" if reason in self.sums[stage].empty_by else "failed"
            raise RunError(
                f"{stage.value}: {lost:,} of the last {recent.rows:,} rows {how} for one reason ({reason.value}), "
                "so that the run stops; remove the cause, and the same command goes on and tries these rows again. If "
                "the rows are to blame, --set run.stop_share=1"
            )

    def _stop_when_hopeless(self, stage: StageName, latest: Tally) -> None:
        if latest.failed < latest.rows:
            self.works.add(stage)
        elif stage not in self.works and stage not in self.patient_with:
            failed = self.sums[stage].failed
            if failed >= self.hopeless_after and (found := self.hopeless()) is not None:
                raise RunError(found.what)

    def close(self, kind: Kind, slice_index: int) -> bool:
        """Notes that a slice's shard of this kind is committed. Returns whether it may stay: not once the phase has
        ended, and the driver takes back what was made in vain."""
        self.under_way.pop(slice_index, None)
        self.deaths.pop(slice_index, None)
        self.closed[kind].add(slice_index)
        return not self.ended

    def end_phase(self) -> None:
        """From now on, what is committed may not stay."""
        self.ended = True

    def shards(self) -> int:
        """How many of those that the phase is for are committed."""
        return len(self.closed[self.makes])

    def stop(self, problem: str) -> None:
        """Notes the first error that ends the run, because Ray's own exceptions bring back only a traceback's text."""
        self.stopped_by = self.stopped_by or problem

    def problem(self) -> str | None:
        return self.stopped_by

    def progress(self) -> dict[StageName, Tally]:
        """The tally of each stage, summed over the slices."""
        return dict(self.sums)
