"""The report as a person meets it: in a real browser, offline, with whatever the web put into the data."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from datapipe.inspect.galleries import AT_AN_EDGE, OF_A_REASON, RANDOM_KEPT, Galleries
from datapipe.inspect.report import report
from datapipe.inspect.statistics import rows_of, sampled, throughput
from datapipe.schema import Reason, Slice, StageName
from datapipe.shards import Store, write_shard
from datapipe.stages.select import SelectSettings
from tests.conftest import kept_sample
from tests.toy import MADE_IMAGES


@pytest.fixture(scope="module")
def page_of_made(made) -> str:
    return report(made.store)


def test_the_funnel_accounts_for_every_row(page_of_made, opened, made):
    page = opened(page_of_made)
    lines = [[cell.strip() for cell in line.split("\t")] for line in page.locator(".funnel tr").all_inner_texts()[1:]]
    lost = sum(int(line[2].replace("−", "").replace(",", "")) for line in lines[1:-1])
    assert int(lines[0][3]) == MADE_IMAGES
    assert int(lines[-1][3]) == MADE_IMAGES - lost == sum(1 for _ in (r for r in rows(made) if r["outcome"] == "kept"))
    assert ["select", "too_few_entities"] in [line[:2] for line in lines]


def rows(made) -> list[dict]:
    return list(rows_of(made.store, sampled(made.store, 0, 10**6)[0]))


def test_every_reason_and_edge_has_its_gallery(page_of_made, opened, made):
    page = opened(page_of_made)
    shown = set(page.locator("#lost h4").all_inner_texts())
    expected = {f"{r['stage']}: {r['reason']}" for r in rows(made) if r["reason"]}
    assert {re.sub(r" \d+$", "", title) for title in shown} == expected
    assert page.locator("#edges h3", has_text="select.min_score").count() == 1
    above, below = (
        [
            float(note.split()[-1])
            for note in page.locator(f"#edges .sides >> nth=0 >> .gallery >> nth={i} >> .note").all_inner_texts()
        ]
        for i in (0, 1)
    )
    assert min(above) >= 0.88 >= max(below)


def test_an_image_opens_to_its_entities_and_masks_can_be_switched_off(page_of_made, opened):
    page = opened(page_of_made)
    card = page.locator("#kept .card").first
    assert card.locator(".mask").count() >= 2
    assert card.locator(".mask").first.is_visible()
    page.locator("#masks").uncheck()
    assert not card.locator(".mask").first.is_visible()
    assert card.locator(".box").first.is_visible()
    page.locator("#boxes").uncheck()
    assert not card.locator(".box").first.is_visible()
    page.locator("#masks").check()
    card.click()
    dialog = page.locator("dialog")
    assert dialog.locator("tr[data-entity]").count() >= card.locator(".mask").count()
    assert dialog.locator(".mask").first.is_visible()
    key = card.get_attribute("data-sample")
    assert key in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_and_every_image_is_there(page_of_made, opened, width, tmp_path):
    page = opened(page_of_made, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    loaded = page.locator(".card img").evaluate_all("images => images.map(i => i.complete && i.naturalWidth > 0)")
    assert len(loaded) > RANDOM_KEPT
    assert all(loaded)
    for picture in page.locator("#kept .picture").all():
        image, frame = picture.bounding_box(), picture.locator("xpath=..").bounding_box()
        assert image["width"] <= frame["width"] + 1
        assert image["height"] <= frame["height"] + 1


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{ 7 * 7 }}\"'>"


def test_text_of_the_web_stays_text(opened, tmp_path, provenance):
    entity = dataclasses.replace(kept_sample(0).entities[0], tag=HOSTILE)
    kept = kept_sample(0).replace(
        caption=HOSTILE,
        alt_text=HOSTILE,
        licence=HOSTILE,
        url=f"javascript:window.hacked=1//{HOSTILE}",
        candidates=(entity,),
    )
    lost = kept_sample(1).replace(url=f"http://{HOSTILE}").dropped(StageName.SELECT, Reason.ERROR, HOSTILE)
    store = Store(str(tmp_path / "set"))
    write_shard(store, "shard", Slice(0, (kept, lost)), provenance)
    page = opened(report(store))
    for card in page.locator(".card").all():
        card.click()
        page.keyboard.press("Escape")
    page.locator("#kept .card").click()
    assert page.locator("dialog dd", has_text="onerror").count() >= 3
    assert page.locator("dialog a").count() == 0, "no link that runs a script"
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0
    assert "49" not in page.locator("#tags").inner_text()


def test_a_large_dataset_is_sampled_and_the_page_says_so(made):
    every, some = sampled(made.store, 1, most_rows=50)
    assert (len(every), len(some)) == (3, 1)
    html = report(made.store, 1, most_rows=50)
    assert f"1 of 3 shards, chosen at random, with 40 of {MADE_IMAGES} rows" in html
    assert f"<b>{MADE_IMAGES}</b> rows in" in html


def test_the_same_seed_gives_the_same_page(made, page_of_made):
    assert report(made.store) == page_of_made
    assert report(made.store, seed=1) != page_of_made


def test_a_gallery_holds_a_bounded_number_however_many_rows_there_are(made):
    galleries = Galleries(SelectSettings(), list(sampled(made.store, 0, 10**6)[0]), seed=0)
    for i, row in enumerate(rows(made) * 20):
        galleries.add({**row, "row": i, "detail": f"of {i:010d}"})
    assert len(galleries.kept().picks) == RANDOM_KEPT
    assert {len(g.picks) for g in galleries.lost()} == {OF_A_REASON}
    assert max(len(g.picks) for *_, above, below in galleries.edges() for g in (above, below)) == AT_AN_EDGE


def test_two_tags_on_one_box_at_an_edge_are_both_shown(made):
    galleries = Galleries(SelectSettings(), list(sampled(made.store, 0, 10**6)[0]), seed=0)
    row = next(r for r in rows(made) if r["stage"] == "select" and r["candidates"])
    galleries.add({**row, "candidates": row["candidates"][:1] * (AT_AN_EDGE + 2)})
    assert {len(g.picks) for *_, above, below in galleries.edges() for g in (above, below)} <= {0, AT_AN_EDGE}
    assert [p.candidate for p in galleries.edges()[0][2].picks] == list(range(AT_AN_EDGE))


def test_throughput_is_what_the_run_recorded(made):
    recorded = [json.loads(line) for line in (made.folder / "throughput.jsonl").read_text().splitlines()]
    assert [list(phase["stages"]) for phase in recorded] == [
        ["fetch", "screen"],
        ["caption", "tag", "ground", "segment", "select"],
    ]
    by_stage = {stage: (rows, seconds) for stage, rows, seconds in throughput(made.store)}
    assert by_stage["fetch"][0] == MADE_IMAGES
    assert all(seconds > 0 for _, seconds in by_stage.values())


def test_the_page_goes_into_the_folder_or_where_it_is_told(sdd, refused, copied, tmp_path):
    code, printed, _ = sdd("report", copied)
    assert code == 0
    assert (copied / "report.html").stat().st_size > 100_000
    assert str(copied / "report.html") in printed
    assert sdd("report", copied, "--save", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_bytes() == (copied / "report.html").read_bytes()
    assert "no such folder" in refused("report", tmp_path / "none")
    assert "no shards here" in refused("report", tmp_path)
    assert "No such file" in refused("report", copied, "--save", tmp_path / "no" / "page.html")
