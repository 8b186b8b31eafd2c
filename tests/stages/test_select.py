"""The paper's entity rules, each by a candidate made for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torchvision.ops import nms

from datapipe.schema import Entity, Outcome, Reason, Rejection, Sample, Tag
from datapipe.stages.select import SelectSettings, SelectStage
from tests.conftest import rle

CAPTION = "a mug and a fish"
SIDE = 100


def candidate(box: tuple[int, int, int, int], score: float = 0.9, **changes: Any) -> Entity:
    """A box whose mask fills it."""
    x1, y1, x2, y2 = box
    entity = Entity(
        "mug", (2, 5), (float(x1), float(y1), float(x2), float(y2)), score, score, rle(SIDE, SIDE, box), 0.9, 0.9
    )
    return dataclasses.replace(entity, **changes)


FIRST = candidate((0, 0, 40, 40), 0.99)
SECOND = candidate((50, 50, 90, 90), 0.98)


def selected(*candidates: Entity, **settings: object) -> Sample:
    return select(Sample(row=0, width=SIDE, height=SIDE, caption=CAPTION, candidates=candidates), **settings)


def select(sample: Sample, **settings: object) -> Sample:
    (done,) = SelectStage(SelectSettings(**settings))([sample])
    return done


@pytest.mark.parametrize(
    ("odd", "rejection"),
    [
        (candidate((50, 0, 90, 40), 0.25), Rejection.SCORE),
        (candidate((50, 0, 90, 40), 0.3), Rejection.SCORE),
        (candidate((50, 0, 90, 40), 0.5, text_score=0.25), Rejection.SCORE),
        (candidate((2, 2, 42, 42), 0.5), Rejection.OVERLAPS_SAME_OBJECT),
        (candidate((50, 0, 70, 40), 0.5), Rejection.AREA),
        (candidate((0, 0, 100, 75), 0.5), Rejection.AREA),
        (candidate((41, 0, 99, 18), 0.5), Rejection.ASPECT),
        (candidate((50, 0, 90, 40), 0.5, span=(15, 30)), Rejection.LABEL),
        (candidate((50, 0, 90, 40), 0.5, mask=None), Rejection.MASK_FILL),
        (candidate((50, 0, 90, 40), 0.5, mask=rle(SIDE, SIDE, (50, 0, 90, 23))), Rejection.MASK_FILL),
        (candidate((50, 0, 90, 40), 0.5, mask=rle(SIDE, SIDE, (0, 60, 40, 100))), Rejection.MASK_FILL),
        (candidate((50, 0, 90, 40), 0.5, mask=rle(SIDE, SIDE, (0, 0, 100, 100))), Rejection.MASK_SIZE),
        (candidate((50, 0, 90, 40), 0.5, mask=rle(SIDE, SIDE, (50, 0, 90, 41))), Rejection.MASK_SIZE),
        (candidate((0, 0, 95, 45), 0.5, mask=rle(SIDE, SIDE, (0, 0, 95, 45))), Rejection.CONTAINED),
    ],
)
def test_each_rule_rejects_what_breaks_it(odd, rejection):
    done = selected(FIRST, SECOND, odd)
    assert done.verdict and done.verdict.outcome is Outcome.KEPT
    assert [c.rejected for c in done.candidates if c.box == odd.box] == [rejection]
    assert [e.box for e in done.entities] == [FIRST.box, SECOND.box]


def test_the_score_is_the_phrases_or_as_in_the_paper_that_of_any_token():
    other_word = candidate((50, 0, 90, 40), 0.9, text_score=0.21)
    whole_word = candidate((0, 60, 40, 100), 0.5)
    assert [e.box for e in selected(other_word, whole_word, min_boxes=0).entities] == [whole_word.box]
    by_paper = selected(other_word, whole_word, score="paper")
    assert [e.box for e in by_paper.entities] == [other_word.box, whole_word.box]
    too_little = candidate((50, 0, 90, 40), 0.9, text_score=0.2)
    done = selected(FIRST, SECOND, too_little, score="paper")
    assert [c.rejected for c in done.candidates if c.box == too_little.box] == [Rejection.TEXT_SCORE]


BESIDE = candidate((50, 0, 90, 40), 0.309)
SPREAD = [candidate((10 * i, 0, 10 * i + 10, 100), 0.9 - i / 100) for i in range(5)]


@pytest.mark.parametrize(
    ("settings", "odd", "rejection"),
    [
        ({"score_digits": 2}, BESIDE, Rejection.SCORE),
        ({"score_digits": 3}, BESIDE, None),
        ({"max_rival_score": 0.2}, dataclasses.replace(BESIDE, rival_score=0.21), Rejection.RIVAL),
        ({"max_rival_score": 0.2}, dataclasses.replace(BESIDE, rival_score=0.2), None),
        ({"max_mask_area": None}, dataclasses.replace(BESIDE, mask=rle(SIDE, SIDE, (0, 0, 100, 100))), None),
    ],
)
def test_a_rule_of_the_released_code_can_be_switched_on_or_off(settings, odd, rejection):
    done = selected(FIRST, SECOND, odd, **settings)
    assert [c.rejected for c in done.candidates if c.box == odd.box] == [rejection]


def test_a_box_in_which_too_many_masks_lie_is_refused():
    wide = candidate((0, 0, 50, 100), 0.5)
    loose: dict[str, Any] = {"min_area": 0.01, "min_aspect": 0.05, "max_containment": 1.0}
    rejected = {
        most: selected(wide, *SPREAD, max_masks_in_box=most, **loose).candidates[-1].rejected for most in (5, 6, None)
    }
    assert rejected == {5: Rejection.CROWDED, 6: None, None: None}


def test_detections_are_counted_after_suppression_or_as_released_before():
    doubled = [candidate((i, i, 40 + i, 40 + i), 0.9 - i / 100) for i in range(8)]
    assert selected(*doubled, SECOND).verdict == selected(doubled[0], SECOND).verdict
    verdict = selected(*doubled, SECOND, count_boxes="before_nms").verdict
    assert verdict and (verdict.reason, verdict.detail) == (Reason.TOO_MANY_BOXES, "9 detections")
    verdict = selected(*doubled[:2]).verdict
    assert verdict and verdict.reason is Reason.TOO_FEW_BOXES
    assert selected(*doubled[:2], count_boxes="before_nms").is_kept


TWICE = "a mug and a fish and a mug"
MUGS = (Tag("mug", (2, 5)), Tag("fish", (12, 16)), Tag("mug", (23, 26)))


def test_a_box_that_is_suppressed_takes_no_mention_from_the_next():
    same = candidate((1, 1, 41, 41), 0.985)
    sample = Sample(row=0, width=SIDE, height=SIDE, caption=TWICE, tags=MUGS, candidates=(FIRST, same, SECOND))
    done = select(sample)
    assert [(e.box, e.span) for e in done.entities] == [(FIRST.box, (2, 5)), (SECOND.box, (23, 26))]


@pytest.mark.parametrize("settings", [{"number_words": True}, {"number_words": True, "min_score": 0.95}])
def test_number_words_stand_before_the_noun_and_come_out_again(settings):
    fish = candidate((0, 60, 40, 100), 0.9, tag="fish", span=(12, 16))
    sample = Sample(row=0, width=SIDE, height=SIDE, caption=TWICE, tags=MUGS, candidates=(FIRST, SECOND, fish))
    done = select(sample, **settings)
    assert done.caption == "a two mug and a fish and a mug"
    assert [done.caption[slice(*t.span)] for t in done.tags] == ["mug", "fish", "mug"]
    assert all(done.caption[slice(*c.span)] == c.tag for c in done.candidates)
    assert select(done.replace(verdict=None), **settings) == done
    plain = select(sample)
    assert plain.caption == TWICE
    assert select(done.replace(verdict=None)) == plain


def test_the_best_are_kept_when_there_is_a_limit():
    done = selected(SECOND, FIRST, max_entities=1)
    assert [e.box for e in done.entities] == [FIRST.box]
    assert done.candidates[1].rejected is Rejection.SURPLUS


def test_images_with_too_few_or_too_many_detections_or_no_entity_are_dropped():
    many = [candidate((10 * i, 0, 10 * i + 9, 9)) for i in range(9)]
    for candidates, reason in (
        ([FIRST], Reason.TOO_FEW_BOXES),
        (many, Reason.TOO_MANY_BOXES),
        (many[:3], Reason.TOO_FEW_ENTITIES),
    ):
        verdict = selected(*candidates).verdict
        assert verdict and verdict.reason is reason


boxes = st.tuples(*[st.integers(0, SIDE - 2)] * 2).flatmap(
    lambda corner: st.tuples(*(st.just(v) for v in corner), *(st.integers(v + 1, SIDE) for v in corner))
)
candidates = st.lists(
    st.builds(
        candidate,
        boxes | st.just((0, 0, 40, 40)),
        st.sampled_from((0.2, 0.31, 0.5, 0.9)),
        text_score=st.sampled_from((0.1, 0.5)),
        span=st.sampled_from(((2, 5), (12, 16), (15, 30))),
    ),
    max_size=10,
)


@given(candidates, st.randoms())
def test_the_order_of_the_candidates_does_not_matter_and_doing_it_twice_changes_nothing(found, random):
    shuffled = list(found)
    random.shuffle(shuffled)
    done = selected(*found, min_boxes=0)
    assert selected(*shuffled, min_boxes=0) == done
    again = selected(*done.candidates, min_boxes=0)
    assert again.candidates == done.candidates


@pytest.mark.parametrize("bad", [{"nms_iou": 1.1}, {"min_score": -0.1}, {"min_entities": 0}, {"min_aspect": 0}])
def test_a_threshold_out_of_range_is_refused(bad):
    with pytest.raises(ValidationError):
        SelectSettings(**bad)


def corner_boxes() -> st.SearchStrategy[tuple[int, int, int, int]]:
    return st.tuples(*[st.integers(0, 12)] * 4).map(lambda b: (min(b[::2]), min(b[1::2]), max(b[::2]), max(b[1::2])))


@given(st.lists(corner_boxes(), min_size=1, max_size=12), st.sampled_from([0.25, 1 / 3, 0.5, 0.75]))
def test_overlapping_detections_go_as_with_torchvision(boxes, nms_iou):
    entities = [
        dataclasses.replace(FIRST, box=(float(x1), float(y1), float(x2), float(y2))) for x1, y1, x2, y2 in boxes
    ]
    verdicts = SelectStage(SelectSettings(nms_iou=nms_iou))._detections(entities)
    order = torch.arange(len(boxes), 0, -1, dtype=torch.float64)
    kept = nms(torch.tensor(boxes, dtype=torch.float64), order, nms_iou).tolist()
    assert [i for i, v in enumerate(verdicts) if v is None] == kept
