"""A dataset takes more rows of its input, another input, and a second attempt at downloads that failed; what was there
stays as it is, and every row is accounted for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapipe.deduplicate import DuplicatesBySlice, find_all_duplicates
from datapipe.growing import _failed, _first_unlike, reasons_to_retry, rows_done_again, with_input, with_retry
from datapipe.inspect import count_manifests, summarize
from datapipe.plan import Part, check_folder, check_sources, claim_folder, make_plan, read_run
from datapipe.recipe import load_recipe
from datapipe.schema import Outcome, Reason, Sample, Slice, StageName, from_table
from datapipe.shards import Store, iter_tables, verify, write_shard
from datapipe.sources import InputRows, rows_as_input
from datapipe.sources.row_index import InputRow, RowFacts
from subject_diffusion.errors import RecipeError, RunError
from tests.toy import TOY_RECIPE, digests, run, write_recipe
from tests.web import Web, serving_toy_images
from toyworld.render.web import render_web_image

ROWS, MORE, SLICE_ROWS = 25, 12, 10
DOWN = {3: 503, 11: 429, 12: 503, 20: 404}
"""Rows of the table that the server answers with an error at first. A 404 is final."""


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving_toy_images(tmp_path_factory.mktemp("web"), 60) as web:
        yield web


def samples_of(out: Path) -> list[Sample]:
    return [s for table in iter_tables(Store(str(out))) for s in from_table(table)]


def kept_and_failed(out: Path) -> tuple[int, int, int]:
    """Rows, and those of them kept and failed, as a reader is told."""
    totals = count_manifests(Store(str(out)))
    return totals.rows, totals.outcomes[Outcome.KEPT], totals.outcomes[Outcome.FAILED]


def test_failed_downloads_are_done_again_and_rows_added(web, tmp_path):
    web.answer = DOWN.get
    recipe = write_recipe(tmp_path / "small.yaml", slice_rows=SLICE_ROWS, fetch={"retries": 0}, toyworld=None)
    out, table = tmp_path / "out", tmp_path / "urls.parquet"
    assert run(recipe, web.table(table, range(ROWS)), out).returncode == 0
    rows, kept, failed = kept_and_failed(out)
    assert (rows, failed) == (ROWS, len(DOWN))
    first = {name: digest for name, digest in digests(out).items() if name.startswith("shard-")}

    web.answer = lambda row: None
    web.asked.clear()
    again = run(recipe, None, out, "--retry", "http_status")
    assert again.returncode == 0, again.stderr
    assert set(web.asked) == {"/0003.jpg", "/0011.jpg", "/0012.jpg"}
    assert kept_and_failed(out) == (ROWS, kept + 3 - lost(out, range(ROWS, ROWS + 3)), 1)
    assert [s.url[-8:] for s in samples_of(out)[ROWS:]] == ["0003.jpg", "0011.jpg", "0012.jpg"]
    assert summarize(Store(str(out))).losses[StageName.FETCH, Reason.HTTP_STATUS, Outcome.FAILED] == 1
    assert "nothing to do" in run(recipe, None, out, "--retry", "transient").stdout

    refused = run(recipe, web.table(table, range(ROWS + MORE)), out)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--append adds this one's rows" in refused.stderr
    web.asked.clear()
    grown = run(recipe, table, out, "--append")
    assert grown.returncode == 0, grown.stderr
    assert set(web.asked) == {f"/{row:04d}.jpg" for row in range(ROWS, ROWS + MORE)}
    assert kept_and_failed(out)[0] == ROWS + MORE
    assert "nothing to do" in run(recipe, table, out).stdout

    for path in out.glob("raw-*"):  # as they may be, once every shard exists
        path.unlink()
    shutil.rmtree(out / "input")
    web.asked.clear()
    other = web.table(tmp_path / "other.parquet", range(30, 20, -1))
    added = run(recipe, other, out, "--append")
    assert added.returncode == 0, added.stderr
    assert set(web.asked) == {f"/{row:04d}.jpg" for row in range(30, 20, -1)}
    assert [(p.rows, p.skip, bool(p.retried)) for p in read_run(Store(str(out))).parts] == [
        (ROWS, 0, False), (3, 0, True), (MORE, ROWS, False), (10, 0, False),
    ]  # fmt: skip
    found = samples_of(out)
    assert [s.row for s in found] == list(range(ROWS + 3 + MORE + 10))
    repeated = [s for s in found[-10:] if s.url[-8:] in kept_urls(found[:-10])]
    assert {s.verdict.reason for s in repeated if s.verdict} == {Reason.EXACT_DUPLICATE}
    assert not list(verify(Store(str(out))))
    assert first.items() <= digests(out).items()


def lost(out: Path, rows: range) -> int:
    """How many of these rows were fetched and then dropped."""
    return sum(not s.is_kept for s in samples_of(out) if s.row in rows)


def kept_urls(samples: list[Sample]) -> set[str]:
    return {s.url[-8:] for s in samples if s.is_kept}


def test_an_input_is_known_again_by_its_rows(tmp_path):
    texts = [f"text {row}" for row in range(30)]
    source = rows_as_input(str(tmp_path), "rows", lambda: (InputRow(RowFacts("", text)) for text in texts))

    def unlike(texts: list[str], part: Part) -> int | None:
        halves = [(list(range(100, 105)), texts[:5]), (list(range(105, 100 + part.rows)), texts[5:])]
        return _first_unlike(source, part, 100, ((n, [RowFacts("", t) for t in some]) for n, some in halves))

    assert unlike(texts[:10], Part(10, "before")) is None
    assert unlike(texts[20:30], Part(10, "before", skip=20)) is None
    assert unlike([*texts[:7], "other", *texts[8:10]], Part(10, "before")) == 7
    assert unlike([*texts[25:30], *["new"] * 5], Part(10, "before", skip=25)) == 5


def test_reasons_to_retry_are_those_that_may_pass():
    every = (Reason.HTTP_STATUS, Reason.UNREACHABLE, Reason.TIMEOUT, Reason.NO_ANSWER)
    assert reasons_to_retry("transient") == every
    assert reasons_to_retry("timeout,http_status") == (Reason.TIMEOUT, Reason.HTTP_STATUS)
    with pytest.raises(RecipeError, match="'too_small' is none of http_status, unreachable, timeout, no_answer"):
        reasons_to_retry("too_small")


def test_what_cannot_grow_says_so(tmp_path):
    nothing = run(Path("toy"), None, tmp_path / "none", "--retry", "transient")
    assert nothing.returncode == 2
    assert nothing.stderr.endswith(f"{tmp_path / 'none'}: no such folder\n")
    assert not (tmp_path / "none").exists()
    assert run(Path("toy"), None, tmp_path / "none", "--append").returncode == 2
    assert run(Path("toy"), Path("x"), tmp_path / "none", "--retry", "transient").returncode == 2


def test_rows_without_an_answer_are_done_again_with_their_image_and_are_no_duplicates_of_themselves(tmp_path):
    """As after a run over frames of a video, some of which a server did not caption or describe."""
    store = Store(str(tmp_path / "out"))
    recipe = load_recipe(TOY_RECIPE, ["toyworld=null", "slice_rows=3"])
    images = [render_web_image(row, 60, 0).jpeg or b"" for row in range(20, 25)]
    facts = [RowFacts(f"{row}.jpg", clip="walk.mp4#0a", time_s=row / 2) for row in range(5)]
    source = rows_as_input(str(tmp_path / "inputs"), "rows", lambda: map(InputRow, facts))
    plan = make_plan(recipe, *with_input(source, store, 3, append=False), store)
    claim_folder(plan, store)
    samples = [s.replace(image=image) for s, image in zip(source.read(0, 5), images, strict=True)]
    screened = recipe.screen.build()(recipe.fetch.build()(samples))
    assert [s.verdict for s in screened] == [None] * 5
    fates = [s.dropped(StageName.CAPTION, Reason.NO_CAPTION) for s in screened]
    for row, stage, may_pass in ((1, "caption", True), (2, "caption", False), (4, "describe", True)):
        fates[row] = screened[row].failed(StageName(stage), Reason.NO_ANSWER, "status 503", may_pass)
    for index, rows in enumerate((slice(0, 3), slice(3, 5))):
        write_shard(store, "raw", Slice(index, tuple(screened[rows])), plan.provenance_of(index))
        write_shard(store, "shard", Slice(index, tuple(fates[rows])), plan.provenance_of(index))
    find_all_duplicates(store, recipe.screen, plan.parts)

    again = make_plan(recipe, *with_retry([Reason.NO_ANSWER], store, 3), store)
    assert again.parts[-1].retried == {"caption/no_answer": 1, "describe/no_answer": 1}
    claim_folder(again, store)
    assert again.to_fetch(store) == [2]
    samples = again.read(2)
    assert [(s.row, s.url, s.image) for s in samples] == [(5, "1.jpg", images[1]), (6, "4.jpg", images[4])]
    assert [(s.clip, s.time_s) for s in samples] == [("walk.mp4#0a", 0.5), ("walk.mp4#0a", 2)]
    ready = recipe.screen.build()(recipe.fetch.build()(samples))
    write_shard(store, "raw", Slice(2, tuple(ready)), again.provenance_of(2))
    find_all_duplicates(store, recipe.screen, again.parts)
    assert DuplicatesBySlice(store).of(range(5, 7)) == []
    assert list(rows_done_again(store, again.parts)) == [1, 4]
    write_shard(
        store, "shard", Slice(2, tuple(s.failed(StageName.CAPTION, Reason.ERROR) for s in ready)), again.provenance
    )
    assert len(with_retry([Reason.NO_ANSWER], store, 3)[0]) == 2, "nothing is left to do again"
    assert summarize(store).losses[StageName.CAPTION, Reason.NO_ANSWER, Outcome.FAILED] == 1

    for path in (tmp_path / "out").glob("raw-*"):
        path.unlink()
    with pytest.raises(RunError, match="row 1 got no answer, and its image went with the raw shards"):
        list(_failed(store, plan.parts, [Reason.NO_ANSWER]))


def test_a_growth_that_was_stopped_goes_on_though_the_inputs_earlier_state_is_gone(tmp_path):
    """As after a stop between the two phases, with a shard of the first part lost."""

    def source(rows: int) -> InputRows:
        facts = [RowFacts("", f"text {row}") for row in range(rows)]
        return rows_as_input(str(tmp_path / "inputs"), f"rows-{rows}", lambda: map(InputRow, facts))

    store = Store(str(tmp_path / "out"))
    recipe = load_recipe(TOY_RECIPE, ["toyworld=null", "slice_rows=5"])
    plan = make_plan(recipe, *with_input(source(12), store, 5, append=False), store)
    claim_folder(plan, store)
    for index in range(plan.slices - 1):
        write_shard(store, "raw", Slice(index, tuple(plan.read(index))), plan.provenance_of(index))
    with pytest.raises(RunError, match="--append adds this one's rows"):
        check_folder(make_plan(recipe, *with_input(source(20), store, 5, append=False), store), store)
    for append in (True, False):  # once it is claimed, the same command goes on
        grown = make_plan(recipe, *with_input(source(20), store, 5, append=append), store)
        check_folder(grown, store)
        assert [(part.rows, part.skip) for part in grown.parts] == [(12, 0), (8, 12)]
        assert grown.to_fetch(store) == [2, 3, 4]
        check_sources(grown, grown.to_fetch(store))
        texts = [(s.row, s.alt_text) for index in grown.to_fetch(store) for s in grown.read(index)]
        assert texts == [(row, f"text {row}") for row in range(10, 20)]
        claim_folder(grown, store)
