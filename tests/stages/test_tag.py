"""Nouns are found, in the singular, where they stand in the caption."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.backends.nouns import RuleNouns, SpacyNouns
from datapipe.schema import Reason, Sample
from datapipe.stages.tag import TagSettings, TagStage
from toyworld.render import NOUNS, PLURALS, render_scene

PIPELINE = TagSettings().model


def tagged(caption: str, **settings: object) -> Sample:
    (done,) = TagStage(TagSettings(**settings))([Sample(row=0, caption=caption)])
    return done


@pytest.mark.parametrize("backend", ["spacy", "rules"])
def test_tags_are_singular_and_spans_cover_the_word_as_written(backend):
    caption = "Two red dogs and a striped mug on a wooden table"
    done = tagged(caption, backend=backend)
    assert [t.text for t in done.tags] == ["dog", "mug", "table"]
    assert [caption[slice(*t.span)] for t in done.tags] == ["dogs", "mug", "table"]
    assert done.verdict is None


@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("a photo of a cat to the left of a boat", ["photo", "cat", "boat"]),
        ("three butterflies , two boxes and some dishes near the bus", ["butterfly", "box", "dish", "bus"]),
        ("a woman holding an umbrella in front of children", ["woman", "umbrella", "child"]),
        ("", []),
        ("?! 3 of the", []),
    ],
)
def test_the_rules_find_the_heads_of_noun_phrases(caption, nouns):
    (tags,) = RuleNouns(None)([caption])
    assert [t.text for t in tags] == nouns


def test_a_closed_list_of_nouns_is_found_in_every_toy_caption():
    find = RuleNouns(NOUNS)
    for seed in range(60):
        scene = render_scene(seed, size=64)
        (tags,) = find([scene.caption])
        assert {t.text for t in tags} == {s.tag for s in scene.subjects}
        assert {t.span for t in tags} == {s.span for s in scene.subjects}
    assert [t.text for t in find([" ".join(PLURALS.values())])[0]] == list(PLURALS)


@given(st.text(max_size=60))
def test_spans_lie_inside_any_caption(caption):
    for tags in RuleNouns(None)([caption]):
        for tag in tags:
            assert caption[slice(*tag.span)]


def test_too_few_and_too_many_nouns_drop_the_image():
    for caption, reason in (("a mug", Reason.TOO_FEW_TAGS), (" and ".join(["a mug"] * 9), Reason.TOO_MANY_TAGS)):
        verdict = tagged(caption, backend="rules").verdict
        assert verdict and verdict.reason is reason


def test_spacy_takes_common_nouns_only():
    (tags,) = SpacyNouns(PIPELINE)(["Anna quickly paints the old house with a brush"])
    assert [t.text for t in tags] == ["house", "brush"]
