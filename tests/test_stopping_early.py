"""A run stops when row after row fails for one reason: the network is gone, or a model. What it wrote off meanwhile is
done again."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from datapipe.ledger import Recent
from datapipe.schema import Reason
from datapipe.shards import Store, present
from tests.toy import digests, run, write_recipe
from tests.web import serving_toy_images

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


def test_a_dead_list_is_done_to_its_end_when_told(tmp_path):
    recipe = write_recipe(tmp_path / "small.yaml", slice_rows=5, fetch={"retries": 0}, toyworld=None)
    (tmp_path / "web").mkdir()
    with serving_toy_images(tmp_path / "web", 20) as web:
        web.answer = lambda row: 404 if row >= 2 else None
        table = web.table(tmp_path / "urls.parquet", range(15))
        done = run(recipe, table, tmp_path / "out", "--set", "run.stop_rows=5", "--set", "run.stop_share=1")
    assert done.returncode == 0, done.stderr
