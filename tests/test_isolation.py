"""A bad row never takes its neighbours along, and nothing retries for ever."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datapipe.errors import RunError
from datapipe.isolation import RESTARTS_OUTSIDE_STAGES, Ledger, Tally, run_stage
from datapipe.schema import Outcome, Reason, Sample, StageName


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


def until_done(stage: Touchy, samples: list[Sample], ledger: Ledger) -> tuple[list[Sample], int]:
    """What Ray does: the whole slice again on a new worker, as often as the worker dies."""
    for deaths in range(10_000):
        try:
            known = ledger.open(0, stage.name)
            return run_stage(stage, samples, slice_index=0, ledger=ledger, deaths=known, deadline_s=60), deaths
        except WorkerDiedError:
            continue
    raise AssertionError("it never ended")


@given(
    rows=st.integers(1, 40),
    micro_batch=st.integers(1, 16),
    raises=st.sets(st.integers(0, 39), max_size=4),
    kills=st.sets(st.integers(0, 39), max_size=4),
    most_in_memory=st.integers(1, 16),
)
def test_exactly_the_bad_rows_fail_and_all_others_get_through(rows, micro_batch, raises, kills, most_in_memory):
    samples = [Sample(row=i, width=i % 3) for i in range(rows)]
    done, deaths = until_done(Touchy(micro_batch, raises, kills, most_in_memory), samples, Ledger())
    assert [s.row for s in done] == list(range(rows))
    for sample in done:
        if sample.row in kills:
            assert sample.verdict and sample.verdict.reason is Reason.KILLED_WORKER
        elif sample.row in raises:
            assert sample.verdict and sample.verdict.reason is Reason.ERROR
        else:
            assert sample.verdict is None
            assert sample.caption == f"row {sample.row}"
    assert deaths <= len(kills) * (2 + micro_batch.bit_length())


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
