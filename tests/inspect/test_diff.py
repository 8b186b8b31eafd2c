"""Two datasets of one input, compared row by row."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

import pytest

from datapipe.inspect.diff import CHANGED, NEITHER, ONLY_A, ONLY_B, SAME, diff, diff_page
from datapipe.schema import Entity, Outcome, from_table
from datapipe.shards import Store, iter_tables
from tests.toy import MADE_IMAGES, Made


@pytest.fixture(scope="module")
def looser(made: Made, tmp_path_factory) -> Store:
    """The same run with looser thresholds; its images lost at selection come from the raw shards."""
    from datapipe.reselect import reselect

    folder = tmp_path_factory.mktemp("looser") / "toy"
    for _ in reselect(str(made.folder), ["select.min_score=0.5", "select.min_entities=1"], str(folder)):
        pass
    return Store(str(folder))


def entities_by_row(store: Store) -> dict[int, tuple[Entity, ...]]:
    """The entities of kept rows, by row."""
    samples = (s for table in iter_tables(store) for s in from_table(table))
    return {s.row: s.entities for s in samples if s.verdict and s.verdict.outcome is Outcome.KEPT}


def test_every_row_has_one_fate(made, looser):
    before, after = entities_by_row(made.store), entities_by_row(looser)
    both = before.keys() & after.keys()
    changed = {row for row in both if before[row] != after[row]}
    fates = diff(made.store, looser).fates
    assert changed
    assert fates == {
        SAME: len(both - changed),
        CHANGED: len(changed),
        ONLY_B: len(after.keys() - before.keys()),
        NEITHER: MADE_IMAGES - len(after),
    }
    assert diff(looser, made.store).fates[ONLY_A] == fates[ONLY_B]


def test_it_names_the_settings_and_the_reasons(sdd, made, looser, tmp_path):
    code, printed, _ = sdd("diff", made.folder, looser.root, "--json")
    told = json.loads(printed)
    assert code == 0
    assert told["settings"] == {"select.min_entities": ["2", "1"], "select.min_score": ["0.88", "0.5"]}
    assert list(told["reasons"]) == [f"{ONLY_B}: select/too_few_entities"]
    assert told["changes"].keys() == {"entities that B gained"}
    code, printed, _ = sdd("diff", made.folder, looser.root, "--save", tmp_path / "diff.html")
    assert code == 0
    assert ONLY_B in printed
    first = told["examples"][0]
    assert f"{first['key']}  A        {first['tag']}" in printed
    assert f"{first['score']:.3f}" in printed


def test_every_entity_that_one_of_them_lost_is_told_with_its_score_and_why(made, looser):
    before, after = entities_by_row(made.store), entities_by_row(looser)
    difference = diff(made.store, looser)
    more = sum((Counter(e.tag for e in after[r]) - Counter(e.tag for e in before.get(r, ())) for r in after), Counter())
    assert difference.lost == {("A", tag): count for tag, count in more.items()}
    examples = difference.lost_entities
    assert {(e.by, e.why) for e in examples} <= {("A", "score"), ("A", "image lost")}
    for example in examples:
        row = int(example.key)
        (entity,) = [e for e in after[row] if e.tag == example.tag and e.text_score == example.score]
        assert entity not in before.get(row, ())
        assert example.why == ("score" if example.score <= 0.88 else "image lost")


def test_the_page_shows_both_versions_of_what_changed(made, looser, opened):
    difference = diff(made.store, looser)
    page = opened(diff_page(made.store, looser, difference))
    gallery = page.locator("section[id^=gallery]", has=page.get_by_role("heading", name=CHANGED))
    cards = gallery.locator(".card").evaluate_all("cards => cards.map(c => c.dataset.sample)")
    assert len(cards) == 2 * min(difference.fates[CHANGED], 12)
    assert [c[1:] for c in cards[::2]] == [c[1:] for c in cards[1::2]]
    masks = [gallery.locator(f".card >> nth={i} >> .mask").count() for i in (0, 1)]
    assert masks[0] < masks[1], "B gained entities"
    assert re.match(r"A: A lost [a-z]+ 0\.\d{3} \(score\)", gallery.locator(".note").first.inner_text())
    gallery.locator(".card").first.click()
    assert page.locator("dialog .mask").count() == masks[0]


def test_a_dataset_does_not_differ_from_itself(sdd, made):
    _, printed, _ = sdd("diff", made.folder, made.folder, "--json")
    told = json.loads(printed)
    assert told["settings"] == told["changes"] == told["reasons"] == {}
    assert told["fates"].keys() == {SAME, NEITHER}


def test_what_cannot_be_compared_is_refused(refused, made, tmp_path):
    other = shutil.copytree(made.folder, tmp_path / "other")
    run = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**run, "parts": [{**run["parts"][0], "input": "another"}]}))
    assert "different inputs" in refused("diff", made.folder, other)
    (other / "run.json").unlink()
    assert "no run.json" in refused("diff", made.folder, other)
    assert "no such folder" in refused("diff", made.folder, tmp_path / "none")
