"""An audit asks about every label of a fair sample, keeps what it is told, and its numbers are those of the truth."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import expect
from pycocotools import mask as coco_mask
from scipy.stats import binomtest

from datapipe.inspect.audit import (
    AUDIT_FILE,
    STAGES,
    choose_samples,
    open_audit,
    precisions,
    question,
    questions,
    wilson_interval,
)
from datapipe.schema import Entity, Sample, current, from_table
from datapipe.shards import Store, kept_samples
from tests.toy import PROJECT
from toyworld.score import matches

CLOSE = 0.85
"""Overlap from which someone calls a box or a mask right."""


def truthful(samples: list[Sample], truth: Path) -> dict[str, bool]:
    """What someone who knows the truth answers to every question."""
    drawn = from_table(current(pq.read_table(truth)))
    marks = {}
    for sample in samples:
        true = drawn[sample.row]
        marks[question(sample, "caption")] = {t.text for t in sample.tags} == {t.text for t in true.tags}
        right = matches(sample.entities, true.candidates)
        indices = [i for i, c in enumerate(sample.candidates) if c.rejected is None]
        for n, i in enumerate(indices):
            marks[question(sample, "tag", i)] = n in right
            found, there = sample.entities[n], true.candidates[right[n]] if n in right else None
            marks[question(sample, "box", i)] = there is not None and overlap(xywh(found), xywh(there)) > CLOSE
            marks[question(sample, "mask", i)] = there is not None and overlap(rle(found), rle(there)) > CLOSE
    return marks


def overlap(one: Any, other: Any) -> float:
    return float(coco_mask.iou([one], [other], [0])[0, 0])


def xywh(entity: Entity) -> list[float]:
    x1, y1, x2, y2 = entity.box
    return [x1, y1, x2 - x1, y2 - y1]


def rle(entity: Entity) -> dict[str, Any]:
    assert entity.mask is not None
    return entity.mask.to_coco()


def test_the_precision_of_a_sample_holds_that_of_the_whole(made):
    everyone = precisions(truthful(list(kept_samples(made.store)), made.truth))
    covered: Counter[str] = Counter()
    for seed in range(10):
        sample = precisions(truthful(choose_samples(made.store, 40, seed), made.truth))
        for what in STAGES:
            assert sample[what].marked >= 40
            covered[what] += sample[what].low <= everyone[what].share <= sample[what].high
    assert min(covered[what] for what in STAGES) >= 8
    assert 0.3 < everyone["mask"].share < 1


def test_strata_have_their_share(made):
    kept = list(kept_samples(made.store))
    whole = Counter(min(len(s.entities), 4) for s in kept)
    part = Counter(min(len(s.entities), 4) for s in choose_samples(made.store, 30, seed=0))
    assert part.total() == 30
    for stratum, count in whole.items():
        assert abs(part[stratum] - 30 * count / len(kept)) < 1
    assert [s.row for s in choose_samples(made.store, 10**6, seed=0)] == [s.row for s in kept]


@pytest.fixture
def running(copied):
    """`sdd audit`, and the address of its page."""
    command = [sys.executable, "-m", "sdd", "audit", str(copied), "-n", "5"]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, env={"BROWSER": "true"})
    assert process.stdout is not None
    images, _, asked, *_ = process.stdout.readline().split()
    assert (images, int(asked)) == ("5", len(questions(choose_samples(Store(str(copied)), 5, 0))))
    yield process, process.stdout.readline().split()[0]
    process.kill()
    process.wait()


def saved(folder: Path) -> dict[str, bool]:
    marks: dict[str, bool] = json.loads((folder / AUDIT_FILE).read_text())["marks"]
    return marks


def test_arrow_keys_mark_and_go_back_and_the_marks_lie_beside_the_dataset(running, browser, copied):
    process, address = running
    asked = questions(choose_samples(Store(str(copied)), 5, 0))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    assert "caption" in page.locator("#question").inner_text()
    for key in ("ArrowRight", "ArrowLeft", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    expect(page.locator("#saved")).to_have_text("saved")
    assert page.locator("#stage .mask").first.is_visible() == (asked[4].endswith("mask"))
    page.locator("#done").click()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert saved(copied) == {asked[0]: True, asked[1]: False, asked[3]: False}
    assert f"3 of {len(asked)} questions answered" in output
    assert said == []
    page.close()


def press(page: Any, *keys: str) -> None:
    """Each is saved before the next."""
    for key in keys:
        with page.expect_response("**/marks"):
            page.keyboard.press(key)


def test_a_reload_loses_nothing_and_goes_on_where_it_was(running, browser, copied):
    asked = questions(choose_samples(Store(str(copied)), 5, 0))
    page = browser.new_page()
    page.goto(running[1])
    press(page, "ArrowRight", "ArrowLeft", "ArrowRight")
    page.reload()
    expect(page.locator("#progress")).to_have_text(f"image 1 of 5, question 4 of {len(asked)}, 3 answered")
    press(page, "ArrowRight")
    assert saved(copied) == {asked[0]: True, asked[1]: False, asked[2]: True, asked[3]: True}
    page.close()


def test_two_pages_at_once_keep_each_others_marks_and_what_was_taken_back_stays_so(running, browser, copied):
    asked = questions(choose_samples(Store(str(copied)), 5, 0))
    one, other = browser.new_page(), browser.new_page()
    one.goto(running[1])
    other.goto(running[1])
    press(one, "ArrowRight")
    other.keyboard.press("ArrowDown")
    press(other, "ArrowLeft")
    assert saved(copied) == {asked[0]: True, asked[1]: False}
    one.keyboard.press("ArrowUp")
    press(one, "ArrowDown")
    press(other, "ArrowRight")
    assert saved(copied) == {asked[1]: False, asked[2]: True}
    one.close()
    other.close()


def test_marks_that_could_not_be_saved_are_sent_again(running, browser, copied):
    page = browser.new_page()
    page.route("**/marks", lambda route: route.abort())
    page.goto(running[1])
    page.keyboard.press("ArrowRight")
    expect(page.locator("#saved")).to_contain_text("NOT SAVED")
    page.unroute("**/marks")
    press(page, "ArrowLeft")
    assert list(saved(copied).values()) == [True, False]
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(running, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(running[1])
    for _ in range(4):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#stage .picture").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        page.keyboard.press("ArrowRight")
    page.close()


def answer(address: str, data: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(address, data, {name.replace("_", "-"): v for name, v in headers.items()})
    try:
        with urllib.request.urlopen(request) as response:
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_the_page_itself_is_listened_to(running, copied):
    _, address = running
    json_type = {"Content_Type": "application/json"}
    asked = questions(choose_samples(Store(str(copied)), 5, 0))
    good = json.dumps({asked[0]: True}).encode()
    assert answer(address) == 200
    assert answer(address, Host="evil.example") == 404
    assert answer(address[:-2] + "x/") == 404
    assert answer(address + "marks", good, **json_type, Host="evil.example") == 404
    assert answer(address + "marks", good, Content_Type="text/plain") == 400
    assert answer(address + "marks", b'{"0000000000/../x": true}', **json_type) == 400
    assert answer(address + "marks", b"not json", **json_type) == 400
    assert answer(address + "marks", good, **json_type, Content_Length="all") == 400
    assert answer(address + "marks", good, **json_type, Content_Length=str(1 << 40)) == 413
    assert not (copied / AUDIT_FILE).exists()
    assert answer(address + "marks", good, **json_type) == 200
    assert saved(copied) == {asked[0]: True}


def test_results_are_said_without_a_page_and_marks_of_other_labels_refused(sdd, refused, copied):
    begun = open_audit(Store(str(copied)), 20, 0)
    asked = questions(choose_samples(Store(str(copied)), 20, 0))
    marks = {name: True for name in asked if name.endswith("caption")}
    (copied / AUDIT_FILE).write_bytes(dataclasses.replace(begun, marks=marks).to_json())
    code, output, _ = sdd("audit", copied, "-n", "20", "--results")
    assert code == 0
    assert "caption" in output
    assert "1.000" in output
    assert "another images (20, now 30)" in refused("audit", copied, "-n", "30", "--results")
    (copied / AUDIT_FILE).write_bytes(dataclasses.replace(begun, dataset="other").to_json())
    assert "another dataset; go on" in refused("audit", copied, "-n", "20", "--results")
    (copied / AUDIT_FILE).write_text("{")
    assert "holds no marks" in refused("audit", copied, "--results")


@pytest.mark.parametrize(("right", "asked"), [(0, 1), (1, 1), (0, 40), (40, 40), (7, 9), (190, 200)])
def test_the_interval_is_scipys(right, asked):
    low, high = binomtest(right, asked).proportion_ci(method="wilson")
    assert wilson_interval(right, asked) == pytest.approx((low, high), abs=1e-12)
