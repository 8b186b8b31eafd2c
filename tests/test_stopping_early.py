"""A run stops when row after row fails for one reason: the network is gone, or a model. What it wrote off meanwhile is
done again."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.ledger import MEMORY_DEATHS, Ledger, Recent, Tally
from datapipe.schema import Entity, Reason, Sample, Slice, StageName, Tag
from datapipe.shards import Store, present
from datapipe.workers import run_stages
from subject_diffusion.errors import RunError
from tests.toy import PROJECT, digests, run, write_images, write_recipe
from tests.web import serving_toy_images

BOX = Entity("mug", (0, 3), (0.0, 0.0, 8.0, 8.0), 0.9, 0.9)
REASONS = [Reason.TIMEOUT, Reason.HTTP_STATUS, Reason.UNREACHABLE]


@given(
    notes=st.lists(st.lists(st.sampled_from([None, *REASONS]), max_size=6)),
    size=st.integers(1, 12),
    share=st.sampled_from([0.5, 0.95, 1.0]),
)
def test_the_last_rows_are_judged_and_no_earlier_ones(notes, size, share):
    recent = Recent(size)
    for note in notes:
        recent.note(len(note), Counter(why for why in note if why is not None))
    last: list[Reason | None] = []
    for note in reversed(notes):
        if len(last) >= size:
            break
        last += note
    failed = max((last.count(reason) for reason in REASONS), default=0)
    stops = len(last) >= size and failed > share * len(last)
    assert (recent.failing(share) is not None) == stops
    if found := recent.failing(share):
        assert last.count(found[0]) == found[1] == failed


def test_a_model_that_gives_nothing_stops_the_run_but_a_strict_filter_does_not():
    silent, strict = (Ledger(stop_share=0.95, stop_rows=100) for _ in range(2))
    for index in range(20):
        strict.end(index, StageName.GROUND, Tally(10, 10))
    nothing = Tally(10, 10, empty_by={Reason.NO_CAPTION: 10})
    for index in range(9):
        silent.end(index, StageName.CAPTION, nothing)
    with pytest.raises(RunError, match=r"caption: 100 of the last 100 rows were dropped for one reason \(no_caption\)"):
        silent.end(9, StageName.CAPTION, nothing)
    assert silent.in_vain() == {StageName.CAPTION: list(range(10))}
    assert strict.in_vain() == {}


@pytest.mark.parametrize(
    ("dropped", "empty"),
    [
        (Sample(0).dropped(StageName.CAPTION, Reason.NO_CAPTION), True),
        (Sample(0).dropped(StageName.TAG, Reason.TOO_FEW_TAGS), True),
        (Sample(0, tags=(Tag("mug", (0, 3)),)).dropped(StageName.TAG, Reason.TOO_FEW_TAGS), False),
        (Sample(0, tags=(Tag("mug", (0, 3)),)).dropped(StageName.GROUND, Reason.TOO_FEW_BOXES), True),
        (Sample(0, candidates=(BOX,)).dropped(StageName.SELECT, Reason.TOO_FEW_BOXES), False),
    ],
)
def test_only_where_a_model_gave_nothing_at_all_it_is_to_blame(dropped, empty):
    class Drops:
        name, micro_batch = StageName.TAG, 4

        def bucket(self, sample):
            return None

        def __call__(self, samples):
            return [dropped.replace(row=s.row) for s in samples]

    ledger = Ledger()
    run_stages([Drops()], Slice(0, (Sample(0), Sample(1))), ledger, 60)
    (tally,) = ledger.progress().values()
    assert (tally.dropped, sum(tally.empty_by.values())) == (2, 2 if empty else 0)


def test_what_another_stage_lost_when_the_run_stopped_is_taken_back_too():
    ledger = Ledger(stop_share=0.9, stop_rows=20, patient_with=frozenset({StageName.FETCH}))
    ledger.end(0, StageName.CAPTION, Tally(10, 0, 0))
    ledger.end(7, StageName.TAG, Tally(10, 0, 0))
    for index in (1, 2):
        ledger.end(index, StageName.SCREEN, Tally(4, 0, 4, failed_by={Reason.UNREACHABLE: 4}))
    with pytest.raises(RunError):
        ledger.end(3, StageName.FETCH, Tally(20, 0, 20, failed_by={Reason.UNREACHABLE: 20}))
    assert ledger.in_vain() == {StageName.FETCH: [3], StageName.SCREEN: [1, 2]}


tallies = st.builds(
    lambda kept, dropped, failed: Tally(
        kept + dropped + failed,
        dropped,
        failed,
        float(kept),
        failed_by={Reason.ERROR: failed} if failed else {},
        empty_by={Reason.NO_CAPTION: dropped} if dropped else {},
    ),
    *[st.integers(0, 5)] * 3,
)


@given(st.lists(st.tuples(st.sampled_from([StageName.CAPTION, StageName.TAG]), st.integers(0, 3), tallies)))
def test_the_progress_is_the_sum_over_the_slices_also_when_one_begins_again(notes):
    ledger = Ledger(patient_with=frozenset(StageName), stop_rows=1_000_000)
    last = {}
    for stage, index, tally in notes:
        ledger.end(index, stage, tally)
        last[stage, index] = tally
    summed: dict[StageName, Tally] = {}
    for (stage, _), tally in last.items():
        summed[stage] = summed.get(stage, Tally()) + tally
    assert ledger.progress() == summed


def test_a_network_that_goes_away_stops_the_run_and_costs_no_row(tmp_path):
    recipe = write_recipe(tmp_path / "small.yaml", slice_rows=10, fetch={"retries": 0}, toyworld=None)
    limits = ["--set", "run.stop_rows=15", "--set", "run.fetch_workers=1"]
    (tmp_path / "web").mkdir()
    with serving_toy_images(tmp_path / "web", 60) as web:
        table = web.table(tmp_path / "urls.parquet", range(40))
        assert run(recipe, table, tmp_path / "undisturbed").returncode == 0

        web.answer = lambda row: 503 if row >= 20 else None
        out = tmp_path / "out"
        stopped = run(recipe, table, out, *limits)
        assert stopped.returncode == 2
        last_line = stopped.stderr.splitlines()[-1]
        assert "fetch: 20 of the last 20 rows failed for one reason (http_status)" in last_line
        assert list(present(Store(str(out)), "raw")) == [0, 1], "what failed in vain is not there"

        web.answer = lambda row: None
        assert run(recipe, table, out, *limits).returncode == 0
    assert digests(out) == digests(tmp_path / "undisturbed")


def test_a_run_for_which_memory_does_not_suffice_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")  # so that Ray's monitor ends every worker
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "50")
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", 40)
    recipe = write_recipe(tmp_path / "small.yaml", toyworld=None)
    stopped = run(recipe, tmp_path / "images", tmp_path / "out")
    assert stopped.returncode == 2
    assert stopped.stderr.splitlines()[-1].startswith("sdd: the memory of a node does not suffice"), stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_workers_ended_for_memory_stop_the_run_unless_shards_of_theirs_are_finished_meanwhile():
    ended = iter(range(100))
    ledger = Ledger(out_of_memory=lambda: next(ended))
    for _ in range(MEMORY_DEATHS):
        ledger.start("shard")
    ledger.close("shard", 0)
    for fetched in range(MEMORY_DEATHS):
        ledger.start("shard")
        ledger.close("raw", fetched)  # those who fetch go on
    with pytest.raises(RunError, match="memory of the nodes does not suffice: Ray ended 10 workers"):
        ledger.start("shard")


SCRIPT = """
import time
import ray
from datapipe.cluster import connected, workers_out_of_memory

@ray.remote(max_retries=0)
def work():
    time.sleep(60)

with connected(None):
    print(workers_out_of_memory())
    try:
        ray.get(work.remote())
    except ray.exceptions.OutOfMemoryError:
        print(workers_out_of_memory())
"""


def test_ray_tells_how_many_workers_it_ended_for_memory(monkeypatch):
    for name, value in {"usage_threshold": "0.01", "monitor_refresh_ms": "50"}.items():
        monkeypatch.setenv(f"RAY_memory_{name}", value)
    monkeypatch.setenv("RAY_task_oom_retries", "0")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]
