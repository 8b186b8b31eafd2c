"""`make dataset` as a stranger meets it: the toy world over real HTTP, scored against the truth it was drawn from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from datapipe.deduplicate import mark_duplicates
from datapipe.duplicate_search import near_duplicates
from datapipe.inspect import summarize
from datapipe.ledger import Ledger
from datapipe.recipe import build_stage, load_recipe
from datapipe.schema import Outcome, Reason, Sample, Slice, StageName
from datapipe.shards import Store
from datapipe.stages import ANNOTATE_STAGES
from datapipe.workers import run_stages
from tests.toy import MADE_PORT, PROJECT, TOY_RECIPE, run, write_recipe
from toyworld.render.web import Flaw, flaw_counts, render_web_image
from toyworld.score import score_against_truth
from toyworld.server import TRUTH, ToyWebSettings, web_folder

IMAGES = 120
PORT = MADE_PORT + 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The dataset's folder and what the command printed."""
    folder = tmp_path_factory.mktemp("toy")
    recipe = write_recipe(folder / "recipe.yaml", toyworld={"images": IMAGES, "port": PORT}, slice_rows=40)
    out = PROJECT / "out" / "test-toy"
    shutil.rmtree(out, ignore_errors=True)
    done = run(recipe, None, out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_pipeline_finds_what_was_drawn(made):
    out, printed = made
    score = score_against_truth(
        Store(str(out)), web_folder(ToyWebSettings(images=IMAGES, port=PORT), PROJECT / "out") / TRUTH
    )
    assert score.images > 0.6 * IMAGES
    assert score.f1 >= 0.9
    assert "entity F1" in printed


def test_every_flaw_is_caught_for_its_own_reason(made):
    losses = summarize(Store(str(made[0]))).losses
    flaws = flaw_counts(IMAGES)
    expected = {
        Flaw.WHITE_BACKGROUND: (StageName.SCREEN, Reason.WHITE_BACKGROUND),
        Flaw.TOO_SMALL: (StageName.SCREEN, Reason.TOO_SMALL),
        Flaw.CORRUPT_JPEG: (StageName.SCREEN, Reason.UNDECODABLE),
        Flaw.EXACT_DUPLICATE: (StageName.SCREEN, Reason.EXACT_DUPLICATE),
        Flaw.NEAR_DUPLICATE: (StageName.SCREEN, Reason.NEAR_DUPLICATE),
        Flaw.DEAD_URL: (StageName.FETCH, Reason.HTTP_STATUS),
    }
    rows = {flaw: sum(losses[*key, outcome] for outcome in Outcome) for flaw, key in expected.items()}
    assert rows == {flaw: flaws[flaw] for flaw in expected}


def test_there_is_a_picture_to_look_at(made):
    sheet = np.asarray(Image.open(made[0] / "contact-sheet.png"))
    assert sheet.shape[1] > 1000, "four columns"
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000, "pictures, not a blank page"
    assert "contact sheet" in made[1]
    assert "funnel" in made[1]


ROWS = 36


@pytest.fixture(scope="module")
def stages():
    recipe = load_recipe(TOY_RECIPE)
    return [build_stage(name, recipe) for name in (StageName.FETCH, StageName.SCREEN)], [
        build_stage(name, recipe) for name in ANNOTATE_STAGES
    ]


@pytest.fixture(scope="module")
def rows() -> list[Sample]:
    """The rows of a small toy web, with their images at hand."""
    images = [render_web_image(row, ROWS, seed=1) for row in range(ROWS)]
    return [Sample(row=row, image=i.jpeg or b"", alt_text=i.alt_text) for row, i in enumerate(images)]


def kept(rows: list[Sample], stages, slice_rows: int) -> set[int]:
    """What the two phases keep when the input is cut into slices of this many rows."""
    first, second = stages
    slices = [
        Slice(i, tuple(rows[start : start + slice_rows])) for i, start in enumerate(range(0, len(rows), slice_rows))
    ]
    screened = [s for work in slices for s in run_stages(first, work, Ledger(), 60).samples]
    alive = [s for s in screened if s.verdict is None]
    duplicates, originals = near_duplicates(np.array([s.phash for s in alive], np.uint64), 4)
    found = [(alive[d].row, alive[o].row, False) for d, o in zip(duplicates, originals, strict=True)]
    done: list[Sample] = []
    for work in slices:
        members = screened[work.index * slice_rows :][: len(work.samples)]
        done += run_stages(second, Slice(work.index, tuple(mark_duplicates(members, found))), Ledger(), 60).samples
    return {s.row for s in done if s.verdict and s.verdict.outcome is Outcome.KEPT}


@pytest.fixture(scope="module")
def kept_in_one_slice(rows, stages) -> set[int]:
    return kept(rows, stages, ROWS)


@settings(
    max_examples=4,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(slice_rows=st.integers(1, ROWS))
def test_any_slice_size_keeps_the_same_rows(rows, stages, kept_in_one_slice, slice_rows):
    assert kept_in_one_slice
    assert kept(rows, stages, slice_rows) == kept_in_one_slice
