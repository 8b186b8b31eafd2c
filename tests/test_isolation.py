"""A bad row never takes its neighbors along, and nothing retries forever."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datapipe.ledger import RESTARTS_OUTSIDE_STAGES, Ledger, Tally
from datapipe.progress import halvings
from datapipe.recipe import Pool, load_recipe
from datapipe.schema import Outcome, Reason, Sample, Slice, StageName
from datapipe.stages.stage import Overlapping
from datapipe.workers import FetchWorker, batches_at_once, run_stages
from subject_diffusion.errors import RunError
from tests.toy import TOY_RECIPE


class WorkerDiedError(BaseException):
    """Stands for the end of the process: like it, it passes through every `except Exception`."""


class Touchy:
    """Captions rows, but raises for some, runs out of memory on large batches, and dies of others."""

    name = StageName.CAPTION

    def __init__(self, micro_batch: int, raises: set[int], kills: set[int], most_in_memory: int = 1000) -> None:
        self.micro_batch, self.raises, self.kills, self.most_in_memory = micro_batch, raises, kills, most_in_memory

    def bucket(self, sample: Sample) -> object:
        return sample.width

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        if len(samples) > self.most_in_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(s.row in self.kills for s in samples):
            raise WorkerDiedError
        if bad := [s.row for s in samples if s.row in self.raises]:
            raise ValueError(f"row {bad[0]} is bad\nat 0x7f00dead")
        return [s.replace(caption=f"row {s.row}") for s in samples]


class TouchyOverlapping(Touchy, Overlapping):
    """The same, for several batches at once."""


def until_done(stage: Touchy, samples: list[Sample], ledger: Ledger, at_once: int = 1) -> tuple[list[Sample], int]:
    """What Ray does: the whole slice again on a new worker, as often as the worker dies."""
    for deaths in range(10_000):
        try:
            done = run_stages([stage], Slice(0, tuple(samples)), ledger, 60, at_once)
            return list(done.samples), deaths
        except WorkerDiedError:
            continue
    raise AssertionError("it never ended")


@given(
    rows=st.integers(1, 40),
    micro_batch=st.integers(1, 16),
    raises=st.sets(st.integers(0, 39), max_size=4),
    kills=st.sets(st.integers(0, 39), max_size=10),
    most_in_memory=st.integers(1, 16),
    at_once=st.integers(1, 4),
)
def test_exactly_the_bad_rows_fail_and_all_others_get_through(
    rows, micro_batch, raises, kills, most_in_memory, at_once
):
    samples = [Sample(row=i, width=i % 3) for i in range(rows)]
    stage = TouchyOverlapping(micro_batch, raises, kills, most_in_memory)
    done, deaths = until_done(stage, samples, Ledger(), at_once)
    assert [s.row for s in done] == list(range(rows))
    for sample in done:
        if sample.row in kills:
            assert sample.verdict and sample.verdict.reason is Reason.KILLED_WORKER
        elif sample.row in raises:
            assert sample.verdict and sample.verdict.reason is Reason.ERROR
        else:
            assert sample.verdict is None
            assert sample.caption == f"row {sample.row}"
    # Models are loaded anew after each. The first one only says that batches must be entered one by one.
    assert deaths <= len(kills) * 2 + 1


def test_the_recorded_error_is_one_line_without_addresses():
    done, _ = until_done(Touchy(4, {1}, set()), [Sample(row=i) for i in range(3)], Ledger())
    verdict = done[1].verdict
    assert verdict and verdict.outcome is Outcome.FAILED
    assert verdict.detail == "ValueError: row 1 is bad at 0x…"


def test_rows_that_already_have_a_verdict_pass_through_untouched():
    dropped = Sample(row=0).dropped(StageName.SCREEN, Reason.TOO_SMALL)
    done, _ = until_done(Touchy(4, {0}, {0}), [dropped, Sample(row=1)], Ledger())
    assert done[0] is dropped
    assert done[1].caption == "row 1"


def test_one_lone_death_is_forgiven_since_a_node_may_have_gone_away():
    ledger = Ledger()
    ledger.open(0, StageName.CAPTION)
    ledger.begin(0, StageName.CAPTION, (0,), Tally())
    done, _ = until_done(Touchy(1, set(), set()), [Sample(row=0)], ledger)
    assert done[0].caption == "row 0"


def test_two_lost_nodes_in_a_slice_accuse_no_row_that_was_alone_at_one_of_them():
    ledger = Ledger()
    for entered in (tuple(range(10)), (3,)):
        ledger.open(0, StageName.CAPTION)
        ledger.begin(0, StageName.CAPTION, entered, Tally())
    done, _ = until_done(Touchy(1, set(), set()), [Sample(row=i) for i in range(10)], ledger)
    assert all(sample.caption for sample in done)


def test_a_worker_that_keeps_dying_outside_of_any_batch_ends_the_run():
    ledger = Ledger()
    for _ in range(1 + RESTARTS_OUTSIDE_STAGES):
        ledger.open(3, StageName.FETCH)
    with pytest.raises(RunError, match="slice 3"):
        ledger.open(3, StageName.FETCH)


def test_progress_counts_a_repeated_slice_once():
    ledger = Ledger()
    stage = Touchy(2, {0}, {3})
    until_done(stage, [Sample(row=i) for i in range(5)], ledger)
    tally = ledger.progress()[StageName.CAPTION]
    assert (tally.rows, tally.failed, tally.dropped) == (5, 2, 0)


def test_batches_that_fail_only_as_a_whole_are_told_of_once_it_happens_again():
    def told(rows: int, *, raises: set[int], most_in_memory: int) -> list[str]:
        ledger = Ledger()
        until_done(Touchy(4, raises, set(), most_in_memory), [Sample(row=i) for i in range(rows)], ledger)
        return list(halvings(ledger.progress()))

    (line,) = told(12, raises=set(), most_in_memory=1)
    assert line.startswith("caption: 3 of 3 batches failed as a whole")
    assert line.endswith("may avoid it (OutOfMemoryError: CUDA out of memory)")
    assert told(4, raises=set(), most_in_memory=2) == [], "once may be chance"
    assert told(12, raises={0, 4, 8}, most_in_memory=4) == [], "a bad row is what halving is for"


class Meeting(Overlapping):
    """Gets through only when `parties` batches are under way at once."""

    name = StageName.GROUND
    micro_batch = 2

    def __init__(self, parties: int) -> None:
        self.barrier = threading.Barrier(parties)

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        self.barrier.wait(30)
        return list(samples)


def test_batches_overlap_and_keep_their_order():
    samples = [Sample(row=i) for i in range(12)]
    assert list(run_stages([Meeting(3)], Slice(0, tuple(samples)), Ledger(), 60, 3).samples) == samples


class Watching(Overlapping):
    """Notes its batches, how many of them are under way, and what the ledger says meanwhile."""

    name = StageName.GROUND
    micro_batch = 2

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.lock = ledger, threading.Lock()
        self.batches: list[tuple[int, ...]] = []
        self.entered: list[bool] = []
        self.under_way = self.most = 0

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        rows = tuple(s.row for s in samples)
        with self.lock:
            self.batches.append(rows)
            self.entered.append(set(rows) <= set(self.ledger.under_way[0][1]))
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        with self.lock:
            self.under_way -= 1
        return list(samples)


def test_the_ledger_knows_every_batch_before_it_starts():
    ledger = Ledger()
    stage = Watching(ledger)
    run_stages([stage], Slice(0, tuple(Sample(row=i) for i in range(40))), ledger, 60, 4)
    assert len(stage.entered) == 20 and all(stage.entered)


class Counting(Ledger):
    """Counts its entries."""

    entries = 0

    def begin(self, *entry: Any) -> None:
        self.entries += 1
        super().begin(*entry)


@pytest.mark.parametrize(("entry_s", "entries"), [(0.0, 50), (3600.0, 2)])
def test_batches_are_entered_together_only_where_they_are_quick(monkeypatch, entry_s, entries):
    monkeypatch.setattr("datapipe.isolation.ENTRY_S", entry_s)
    ledger = Counting()
    run_stages([Touchy(2, set(), set())], Slice(0, tuple(Sample(row=i) for i in range(100))), ledger, 60)
    assert ledger.entries == entries, "the first batch shows how long one takes"


def test_a_death_while_batches_overlap_accuses_none_and_the_slice_goes_on_one_batch_at_a_time():
    ledger = Ledger()
    ledger.open(0, StageName.GROUND)
    ledger.begin(0, StageName.GROUND, (0, 1, 2, 3), Tally())
    stage = Watching(ledger)
    run_stages([stage], Slice(0, tuple(Sample(row=i) for i in range(8))), ledger, 60, 4)
    assert stage.batches == [(0, 1), (2, 3), (4, 5), (6, 7)], "none is halved"
    assert stage.most == 1


def test_a_stage_that_does_not_say_so_is_called_once_at_a_time():
    class Plain(Touchy):
        def __init__(self) -> None:
            super().__init__(1, set(), set())
            self.free = threading.Lock()

        def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
            assert self.free.acquire(blocking=False)
            try:
                return super().__call__(samples)
            finally:
                self.free.release()

    done, _ = until_done(Plain(), [Sample(row=i) for i in range(50)], Ledger(), at_once=4)
    assert all(s.caption for s in done)


def test_batches_overlap_only_where_a_gpu_does_the_work():
    stages = (StageName.GROUND,)
    assert batches_at_once(Pool(stages=stages, cpus=4)) == 1
    assert batches_at_once(Pool(stages=stages, cpus=0.5, gpus=0.5)) == 2
    assert batches_at_once(Pool(stages=stages, cpus=4, gpus=1)) == 5


class Decoding(Overlapping):
    """Kills its process while it decodes row 5, once another batch has the model; hangs at row 11 in native code that
    holds the interpreter's lock."""

    name = StageName.GROUND
    micro_batch = 2

    def __init__(self) -> None:
        self.has_model = threading.Event()

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        rows = [s.row for s in samples]
        if 5 in rows:
            self.has_model.wait(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if 11 in rows:
            re.match(r"(a+)+$", "a" * 64 + "b")
        self.has_model.set()
        return [s.replace(caption="seen") for s in samples]


class LedgerServer(BaseManager):
    """The ledger in a process that outlives the workers."""


LedgerServer.register("Ledger", Ledger)


def work(ledger: Any, results: Any) -> None:
    done = run_stages([Decoding()], Slice(0, tuple(Sample(row=i) for i in range(16))), ledger, 2, 3)
    results.put([(s.row, s.verdict and s.verdict.reason, s.caption) for s in done.samples])


def test_a_decoder_that_kills_or_hangs_its_process_costs_only_its_own_row_and_not_the_one_in_the_model():
    context = multiprocessing.get_context("fork")  # The workers need nothing that must be imported anew.
    results = context.SimpleQueue()
    with LedgerServer(ctx=context) as server:
        ledger = server.Ledger()  # type: ignore[attr-defined]  # registered above
        for _ in range(1 + 2 * 2 + 1):
            worker = context.Process(target=work, args=(ledger, results))
            worker.start()
            worker.join()
            if worker.exitcode == 0:
                break
        assert worker.exitcode == 0
    for row, reason, caption in results.get():
        bad = row in (5, 11)
        assert (reason, caption) == ((Reason.KILLED_WORKER, "") if bad else (None, "seen"))


class DeadlyInput:
    """A plan whose input has an image that kills its reader, or hangs it, as a decoder of videos may."""

    def __init__(self, out: Path, harm: str) -> None:
        self.out, self.harm = str(out), harm
        self.recipe = load_recipe(TOY_RECIPE, ["toyworld=null", "run.deadline_s=0.4"])

    def read(self, index: int, hold: Callable[[bytes], bytes]) -> list[Sample]:
        if self.harm == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(3):
            time.sleep(0.2)  # together longer than the deadline, but no image is
            hold(b"image")
        re.match(r"(a+)+$", "a" * 64 + "b")
        return []


class LocalLedger:
    """As `RemoteLedger`, of a ledger that is no actor."""

    def __init__(self, ledger: Any) -> None:
        self.start, self.open = ledger.start, ledger.open

    def noting_errors(self) -> AbstractContextManager[None]:
        return nullcontext()


def fetch(plan: Any, ledger: Any, results: Any) -> None:
    try:
        FetchWorker(plan, ledger)({"slice": 0})
    except RunError as error:
        results.put(str(error))


@pytest.mark.parametrize("harm", ["kill", "hang"])
def test_an_input_that_kills_or_hangs_its_readers_ends_the_run_in_one_line(tmp_path, monkeypatch, harm):
    monkeypatch.setattr("datapipe.workers.RemoteLedger", LocalLedger)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with LedgerServer(ctx=context) as server:
        ledger = server.Ledger()  # type: ignore[attr-defined]  # registered above
        plan, codes = DeadlyInput(tmp_path, harm), []
        for _ in range(1 + RESTARTS_OUTSIDE_STAGES + 1):
            worker = context.Process(target=fetch, args=(plan, ledger, results))
            worker.start()
            worker.join()
            codes.append(worker.exitcode)
    assert codes == [-signal.SIGKILL if harm == "kill" else 1] * (1 + RESTARTS_OUTSIDE_STAGES) + [0]
    assert results.get().startswith("slice 0: its worker keeps dying outside of any stage")
