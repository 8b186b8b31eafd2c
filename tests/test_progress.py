"""What a run shows of itself: where it is in the whole, what is left of it, on a narrow terminal and in a log."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from datapipe.ledger import Tally
from datapipe.progress import Done, Phase, display, left_s, line, pause_s
from datapipe.schema import StageName
from datapipe.stages import ANNOTATE_STAGES, FETCH_STAGES
from tests.toy import PROJECT

FETCHING = Phase(1, 2, [FETCH_STAGES], 1000, shards=25, shards_before=5, stage_s={}, later_row_s=2.0)
ANNOTATING = Phase(2, 2, [ANNOTATE_STAGES], 900, 25, 0, stage_s=dict.fromkeys(ANNOTATE_STAGES, 1.0))
HALF_FETCHED = Done({StageName.FETCH: Tally(500, 0, 100, 40.0), StageName.SCREEN: Tally(400, 200, 0, 10.0)}, shards=10)


def test_where_phases_overlap_the_slower_one_tells_the_time_left():
    both = Phase(1, 1, [FETCH_STAGES, [StageName.CAPTION]], 1000, 40, 10, stage_s={}, joining={StageName.CAPTION: 250})
    fetched = {StageName.FETCH: Tally(1000, 0, 0, 900.0), StageName.SCREEN: Tally(1000, 250, 0, 100.0)}
    done = Done(fetched | {StageName.CAPTION: Tally(100, 0, 0, 50.0)}, shards=4)
    assert left_s(both, done, 60.0) == 60.0 * (1000 - 100) / 100
    assert "caption 100/1,000 (-0)" in line(both, done, 60.0)


def test_a_line_of_a_log_says_where_in_the_whole_the_run_is():
    assert line(FETCHING, HALF_FETCHED, 25.0) == (
        "phase 1 of 2: 15/25 shards, 16.0 rows/s, 0:13:45 left; fetch 500/1,000 (-100), screen 400/800 (-200)"
    )


def test_until_the_models_are_loaded_no_speed_is_shown():
    said = line(ANNOTATING, Done(), 30.0)
    assert said.startswith("phase 2 of 2: 0/25 shards, starting workers, which load the models; caption 0/900")
    assert "rows/s" not in said


def test_the_time_left_is_that_of_all_phases():
    # 25 s for half of the first phase; 400 of 1,000 rows are kept, at 2 s each.
    assert left_s(FETCHING, HALF_FETCHED, 25.0) == pytest.approx(25 + 400 * 2.0)


def test_a_stage_that_no_row_has_reached_is_expected_to_take_what_it_took_for_the_test_image():
    done = Done({StageName.CAPTION: Tally(900, 0, 0, 900.0)})
    # Two workers are at work: 900 s of a worker took 450 s. Four stages of 900 s are left to them.
    assert left_s(ANNOTATING, done, 450.0) == pytest.approx(4 * 900 / 2)
    assert left_s(ANNOTATING, Done(), 450.0) is None


def test_a_log_of_a_long_run_has_fewer_lines():
    assert [pause_s(elapsed) for elapsed in (0, 100, 3600, 10**6)] == [10, 10, 180, 600]


def test_a_terminal_of_40_columns_is_wide_enough():
    tally = Tally(999_999, 400_000, 99_999, 1e6)
    for phase in (FETCHING, ANNOTATING):
        sink = io.StringIO()
        Console(file=sink, width=40).print(display(phase, Done(dict.fromkeys(phase.stages, tally), 10), 3600.0))
        where, _, headings, *rows = sink.getvalue().splitlines()
        assert where.split()[:4] == ["phase", str(phase.number), "of", "2:"]
        assert headings.split() == ["stage", "rows", "kept", "dropped", "failed"]
        assert [row.split() for row in rows] == [
            [stage.value, "999,999", "500,000", "400,000", "99,999"] for stage in phase.stages
        ]


def test_the_first_line_waits_for_no_heavy_import():
    code = (
        "import sys, sdd.cli, datapipe.progress, datapipe.machine\n"
        "print({'ray', 'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
