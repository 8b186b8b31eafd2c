"""The paper's entity rules, each by a candidate made for it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from datapipe.schema import Entity, Outcome, Reason, Rejection, Sample
from datapipe.stages.select import SelectSettings, SelectStage
from tests.conftest import rle

CAPTION = "a mug and a fish"
SIDE = 100


def candidate(box: tuple[int, int, int, int], score: float = 0.9, **changes: object) -> Entity:
    """A box whose mask fills it."""
    x1, y1, x2, y2 = box
    entity = Entity(
        "mug", (2, 5), (float(x1), float(y1), float(x2), float(y2)), score, score, rle(SIDE, SIDE, box), 0.9, 0.9
    )
    return dataclasses.replace(entity, **changes)


FIRST = candidate((0, 0, 40, 40), 0.99)
SECOND = candidate((50, 50, 90, 90), 0.98)


def selected(*candidates: Entity, **settings: object) -> Sample:
    sample = Sample(row=0, width=SIDE, height=SIDE, caption=CAPTION, candidates=candidates)
    (done,) = SelectStage(SelectSettings(**settings))([sample])
    return done


@pytest.mark.parametrize(
    ("odd", "rejection"),
    [
        (candidate((50, 0, 90, 40), 0.25), Rejection.SCORE),
        (candidate((50, 0, 90, 40), 0.3), Rejection.SCORE),
        (candidate((50, 0, 90, 40), text_score=0.2), Rejection.TEXT_SCORE),
        (candidate((2, 2, 42, 42), 0.5), Rejection.OVERLAPS_SAME_OBJECT),
        (candidate((50, 0, 70, 40), 0.5), Rejection.AREA),
        (candidate((0, 0, 100, 75), 0.5), Rejection.AREA),
        (candidate((41, 0, 99, 18), 0.5), Rejection.ASPECT),
        (candidate((50, 0, 90, 40), 0.5, span=(15, 30)), Rejection.LABEL),
        (candidate((50, 0, 90, 40), 0.5, mask=None), Rejection.MASK_FILL),
        (candidate((50, 0, 90, 40), 0.5, mask=rle(SIDE, SIDE, (50, 0, 90, 23))), Rejection.MASK_FILL),
        (candidate((0, 0, 95, 45), 0.5, mask=rle(SIDE, SIDE, (0, 0, 95, 45))), Rejection.CONTAINED),
    ],
)
def test_each_rule_rejects_what_breaks_it(odd, rejection):
    done = selected(FIRST, SECOND, odd)
    assert done.verdict and done.verdict.outcome is Outcome.KEPT
    assert [c.rejected for c in done.candidates if c.box == odd.box] == [rejection]
    assert [e.box for e in done.entities] == [FIRST.box, SECOND.box]


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
