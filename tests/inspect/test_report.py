"""The report as a person meets it: in a real browser, offline, with whatever the web put into the data."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from datapipe.inspect.galleries import AT_AN_EDGE, OF_A_REASON, RANDOM_KEPT, Galleries
from datapipe.inspect.report import report_page
from datapipe.inspect.row_list import MOST_LISTED
from datapipe.inspect.statistics import choose_shards, statistics_rows, throughput
from datapipe.plan import record_found
from datapipe.schema import Reason, Sample, Slice, StageName
from datapipe.shards import Store, write_shard
from datapipe.stages.select import SelectSettings
from tests.conftest import kept_sample
from tests.toy import MADE_IMAGES


@pytest.fixture(scope="module")
def page_of_made(made) -> str:
    return report_page(made.store)


def test_the_funnel_accounts_for_every_row(page_of_made, opened, made):
    page = opened(page_of_made)
    lines = [[cell.strip() for cell in line.split("\t")] for line in page.locator(".funnel tr").all_inner_texts()[1:]]
    lost = sum(int(line[2].replace("−", "").replace(",", "")) for line in lines[1:-1])
    assert int(lines[0][3]) == MADE_IMAGES
    assert int(lines[-1][3]) == MADE_IMAGES - lost == sum(1 for _ in (r for r in rows(made) if r["outcome"] == "kept"))
    assert ["select", "too_few_entities"] in [line[:2] for line in lines]


def rows(made) -> list[dict[str, Any]]:
    return list(statistics_rows(made.store, choose_shards(made.store, 0, 10**6)[0]))


def test_every_reason_and_edge_has_its_gallery(page_of_made, opened, made):
    page = opened(page_of_made)
    shown = set(page.locator("#lost h4").all_inner_texts())
    expected = {f"{r['stage']}: {r['reason']}" for r in rows(made) if r["reason"]}
    assert {re.sub(r" \d+$", "", title) for title in shown} == expected
    assert page.locator("#edges h3", has_text="select.min_score").count() == 1
    above, below = (
        [
            float(note.split()[1])
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


def found(page) -> int:
    """Rows that the list's filters leave."""
    words = page.locator("#rows-found").inner_text()
    return 0 if words == "No row matches." else int(words.split()[-2].replace(",", ""))


def test_rows_are_searched_filtered_and_sorted(page_of_made, opened, made):
    page = opened(page_of_made)
    every = rows(made)
    assert found(page) == MADE_IMAGES
    page.locator("#rows-fate").select_option("screen: white_background")
    white = [r for r in every if r["reason"] == "white_background"]
    assert found(page) == len(white) > 0
    assert page.locator("#rows-cards img").count() == len(white), "screening left a thumbnail of each"
    page.locator("#rows-fate").select_option("box: score")
    assert found(page) == sum(any(c["rejected"] == "score" for c in r["candidates"]) for r in every)
    page.locator("#rows-fate").select_option("kept")
    kept = [r for r in every if r["outcome"] == "kept"]
    assert found(page) == len(kept)
    tag = next(c["tag"] for c in kept[0]["candidates"] if c["rejected"] is None)
    page.locator("#rows-tag").select_option(tag)
    assert 0 < found(page) < len(kept)
    assert all(tag in page.locator(f"#rows-cards .card >> nth={i}").inner_text() for i in range(found(page)))
    page.locator("#rows-tag").select_option("")
    page.locator("#rows-search").fill(kept[1]["key"].upper())
    assert found(page) == 1
    page.locator("#rows-search").fill("no such words")
    assert found(page) == 0
    page.locator("#rows-search").fill("")
    page.locator("#rows-order").select_option("highest score first")
    page.locator("#rows-cards .card").first.click()
    shown = page.locator("dialog tr[data-entity] td:nth-child(2)").all_inner_texts()
    best = max(c["score"] for r in kept for c in r["candidates"] if c["rejected"] is None)
    assert float(max(shown)) == pytest.approx(best, abs=1e-3)


def test_the_arrow_keys_go_through_a_gallery_and_over_the_pages_of_the_list(page_of_made, opened):
    page = opened(page_of_made)
    cards, place = page.locator("#kept .card"), page.locator("dialog .place")
    cards.nth(1).click()
    page.keyboard.press("ArrowRight")
    assert place.inner_text() == f"3 of {RANDOM_KEPT}"
    assert cards.nth(2).get_attribute("data-sample") in page.locator("dialog").inner_text()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    assert place.inner_text() == f"1 of {RANDOM_KEPT}"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement === document.querySelector('#kept .card')")
    page.locator("#rows-cards .card").last.click()
    page.keyboard.press("ArrowRight")
    assert place.inner_text() == f"61 of {MADE_IMAGES}"
    page.keyboard.press("Escape")
    assert page.locator("#rows-found").inner_text().startswith("61 to ")
    assert page.evaluate("document.activeElement === document.querySelector('#rows-cards .card')")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_dialog_can_be_closed_wherever_it_is_scrolled_to(page_of_made, opened, width):
    page = opened(page_of_made, width)
    page.locator("#kept .card").first.click()
    page.locator("dialog").evaluate("dialog => dialog.scrollTo(0, dialog.scrollHeight)")
    close = page.locator("dialog .close")
    box = close.bounding_box()
    assert 0 <= box["x"] <= width - box["width"]
    assert 0 <= box["y"] <= 900 - box["height"]
    page.locator("dialog").evaluate("dialog => dialog.scrollTo(0, 0)")
    assert close.bounding_box()["y"] + box["height"] <= page.locator("dialog .picture").bounding_box()["y"]
    close.click()
    assert not page.locator("dialog").is_visible()


def test_thumbnails_have_the_names_of_their_tags(page_of_made, opened, made):
    page = opened(page_of_made)
    card = page.locator("#kept .card").first
    assert card.locator(".name").count() == card.locator(".mask").count()
    row = next(r for r in rows(made) if r["key"] == card.get_attribute("data-sample"))
    assert card.locator(".name").all_inner_texts() == [c["tag"] for c in row["candidates"] if c["rejected"] is None]
    page.locator("#names").uncheck()
    assert not card.locator(".name").first.is_visible()


def test_ten_thousand_rows_are_drawn_a_page_at_a_time(opened, tmp_path, provenance):
    lost = [
        Sample(row=row, url=f"http://example.com/{row}.jpg").failed(StageName.FETCH, Reason.HTTP_STATUS, "404")
        for row in range(20, MOST_LISTED + 50)
    ]
    store = Store(str(tmp_path / "set"))
    write_shard(store, "shard", Slice(0, (*(kept_sample(row) for row in range(20)), *lost)), provenance)
    page = opened(report_page(store))
    assert found(page) == MOST_LISTED
    assert f"{MOST_LISTED:,} of {MOST_LISTED + 50:,} rows" in page.locator("#rows").inner_text()
    assert page.locator("#rows-cards .card").count() == 60
    page.locator("#rows-later").click()
    assert page.locator("#rows-found").inner_text() == f"61 to 120 of {MOST_LISTED:,} rows"
    assert page.locator("#rows-cards .card").count() == 60
    page.locator("#rows-fate").select_option("kept")
    assert page.locator("#rows-cards img").count() == found(page) > 0


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


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{ 7777 * 7777 }}\"'>"


def test_text_of_the_web_stays_text(opened, tmp_path, provenance):
    entity = dataclasses.replace(kept_sample(0).entities[0], tag=HOSTILE, desc=HOSTILE)
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
    page = opened(report_page(store))
    for card in page.locator(".card").all():
        card.click()
        page.keyboard.press("Escape")
    page.locator("#kept .card").click()
    assert page.locator("dialog dd", has_text="onerror").count() >= 3
    assert page.locator("dialog td .desc", has_text="onerror").count() == 1
    assert page.locator("dialog a").count() == 0, "no link that runs a script"
    page.locator("#rows-search").fill("onerror")
    assert page.locator("#rows-cards .card").count() == 2
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0
    assert "60481729" not in page.locator("#tags").inner_text()


def test_a_large_dataset_is_sampled_and_the_page_says_so(made):
    every, some = choose_shards(made.store, 1, most_rows=50)
    assert (len(every), len(some)) == (3, 1)
    html = report_page(made.store, 1, most_rows=50)
    assert f"1 of 3 shards, chosen at random, with 40 of {MADE_IMAGES} rows" in html
    assert f"<b>{MADE_IMAGES}</b> rows in" in html


def test_the_same_seed_gives_the_same_page(made, page_of_made):
    assert report_page(made.store) == page_of_made
    assert report_page(made.store, seed=1) != page_of_made


def test_a_gallery_holds_a_bounded_number_however_many_rows_there_are(made):
    galleries = Galleries(SelectSettings(), list(choose_shards(made.store, 0, 10**6)[0]), seed=0)
    for i, row in enumerate(rows(made) * 20):
        galleries.add({**row, "row": i, "detail": f"of {i:010d}"})
    assert len(galleries.kept().items) == RANDOM_KEPT
    assert {len(g.items) for g in galleries.lost()} == {OF_A_REASON}
    assert max(len(g.items) for edge in galleries.edges() for g in (edge.above, edge.below)) == AT_AN_EDGE


def test_two_tags_on_one_box_at_an_edge_are_both_shown(made):
    galleries = Galleries(SelectSettings(), list(choose_shards(made.store, 0, 10**6)[0]), seed=0)
    row = next(r for r in rows(made) if r["stage"] == "select" and r["candidates"])
    galleries.add({**row, "candidates": row["candidates"][:1] * (AT_AN_EDGE + 2)})
    assert {len(g.items) for edge in galleries.edges() for g in (edge.above, edge.below)} <= {0, AT_AN_EDGE}
    assert [p.candidate for p in galleries.edges()[0].above.items] == list(range(AT_AN_EDGE))


def test_what_just_passed_two_thresholds_of_one_score_is_shown_once(made):
    galleries = Galleries(SelectSettings(score="phrase"), list(choose_shards(made.store, 0, 10**6)[0]), seed=0)
    row = next(r for r in rows(made) if r["outcome"] == "kept")
    accepted = next(c for c in row["candidates"] if c["rejected"] is None)
    refused = {**accepted, "rejected": "score", "text_score": 0.29996}
    galleries.add({**row, "candidates": [{**accepted, "text_score": 0.4}, refused]})
    edge = galleries.edges()[0]
    assert edge.limits == (("min_score", 0.3), ("text_threshold", 0.2))
    assert [item.note for item in edge.above.items] == [f"{accepted['tag']} 0.400"]
    assert [item.note for item in edge.below.items] == [f"{accepted['tag']} 0.29996 < 0.3"]


def test_a_score_that_is_cut_before_it_is_compared_is_told_as_it_was_compared(made):
    settings = SelectSettings(score="paper", min_score=0.3, score_digits=1)
    galleries = Galleries(settings, list(choose_shards(made.store, 0, 10**6)[0]), seed=0)
    row = next(r for r in rows(made) if r["outcome"] == "kept")
    refused = {**row["candidates"][0], "rejected": "score", "score": 0.39}
    galleries.add({**row, "candidates": [refused]})
    assert [item.note for item in galleries.edges()[0].below.items] == [f"{refused['tag']} 0.300 = 0.3"]


def test_throughput_is_what_the_run_recorded(made):
    recorded = [json.loads(line) for line in (made.folder / "throughput.jsonl").read_text().splitlines()]
    assert [list(phase["stages"]) for phase in recorded] == [
        ["fetch", "screen"],
        ["caption", "tag", "ground", "segment", "select"],
    ]
    by_stage = {stage: (rows, seconds) for stage, rows, seconds in throughput(made.store)}
    assert by_stage["fetch"][0] == MADE_IMAGES
    assert all(seconds > 0 for _, seconds in by_stage.values())


def test_what_a_run_found_for_its_gpu_is_on_the_page(copied):
    store = Store(str(copied))
    assert "Found on the GPU" not in report_page(store)
    record_found(
        store, {StageName.CAPTION: {"micro_batch": 64}, StageName.SEGMENT: {"micro_batch": 16, "compile": True}}
    )
    assert "Found on the GPU: caption micro_batch 64; segment micro_batch 16, compile true." in report_page(store)


def test_the_page_goes_into_the_folder_or_where_it_is_told(sdd, refused, copied, tmp_path):
    code, printed, _ = sdd("report", copied)
    assert code == 0
    assert (copied / "report.html").stat().st_size > 100_000
    assert str(copied / "report.html") in printed
    assert sdd("report", copied, "--save", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_bytes() == (copied / "report.html").read_bytes()
    assert "no such folder" in refused("report", tmp_path / "none")
    assert "no shards here" in refused("report", tmp_path)
    assert "no such file" in refused("report", copied, "--save", tmp_path / "no" / "page.html")
