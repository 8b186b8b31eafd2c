"""Nouns are found as the caption has them, where they stand in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.backends.nouns import RuleNouns, SpacyNouns
from datapipe.schema import Reason, Sample, Tag
from datapipe.stages.tag import TagSettings, TagStage
from toyworld.render import NOUNS, PLURALS, render_scene

PIPELINE = TagSettings().model


def tagged(caption: str, **settings: object) -> Sample:
    (done,) = TagStage(TagSettings(**settings))([Sample(row=0, caption=caption)])
    return done


@pytest.mark.parametrize("backend", ["spacy", "rules"])
@pytest.mark.parametrize("compounds", [True, False])
def test_tags_are_the_captions_own_words(backend, compounds):
    caption = "A woman with glasses and jeans, scissors, two Cookies and tomatoes, a gas lens and a bus"
    done = tagged(caption, backend=backend, compounds=compounds, max_tags=20)
    texts = [t.text for t in done.tags]
    assert texts[:6] == ["woman", "glasses", "jeans", "scissors", "cookies", "tomatoes"]
    assert texts[-1] == "bus"
    assert [caption[slice(*t.span)].lower() for t in done.tags] == texts
    assert done.verdict is None


COMPOUNDS = {
    "a red fire hydrant next to a traffic light": ["fire hydrant", "traffic light"],
    "three teddy bears wearing sunglasses": ["teddy bears", "sunglasses"],
    "a man in a T-shirt holding scissors": ["man", "t-shirt", "scissors"],
    "an x-ray of a hand": ["x-ray", "hand"],
    "a black-and-white cat in a well-lit room": ["cat", "room"],
    "a parking meter , a stop sign and a hot dog": ["parking meter", "stop sign", "hot dog"],
}


@pytest.mark.parametrize("backend", ["spacy", "rules"])
@pytest.mark.parametrize("caption", COMPOUNDS)
def test_a_name_of_several_words_is_one_tag(backend, caption):
    assert [t.text for t in tagged(caption, backend=backend).tags] == COMPOUNDS[caption]


def test_spacy_finds_names_that_are_in_no_list_by_the_noun_chunk():
    done = tagged("a two-story brick house beside a bread knife and a mother-in-law")
    assert [t.text for t in done.tags] == ["brick house", "bread knife", "mother-in-law"]


PHRASES = {
    "a shiny red mug beside an old traffic light": ["shiny red mug", "old traffic light"],
    "two small fish in a round glass bowl": ["small fish", "round glass bowl"],
    "the big brown dog is on a sofa": ["big brown dog", "sofa"],
}


@pytest.mark.parametrize("backend", ["spacy", "rules"])
@pytest.mark.parametrize("caption", PHRASES)
def test_a_phrase_has_the_words_that_describe_its_noun(backend, caption):
    done = tagged(caption, backend=backend, phrases=True, min_tags=2)
    assert [t.text for t in done.tags] == PHRASES[caption]
    assert [caption[slice(*t.span)] for t in done.tags] == PHRASES[caption]
    assert done.verdict is None


def test_phrases_and_a_list_of_nouns_do_not_go_together():
    with pytest.raises(ValueError, match="phrases: with nouns, or with backend=caption"):
        TagSettings(backend="rules", nouns=("mug",), phrases=True)


def test_what_the_captioner_listed_is_counted_and_kept():
    listed = Sample(row=0, caption="a red mug", tags=(Tag("red mug", (2, 9)),))
    stage = TagStage(TagSettings(backend="caption", min_tags=1))
    assert stage([listed]) == [listed]
    (lost,) = stage([listed.replace(tags=())])
    assert lost.verdict and lost.verdict.reason is Reason.TOO_FEW_TAGS


def test_the_released_code_takes_each_noun_for_itself():
    done = tagged("a fire hydrant and a traffic light", compounds=False)
    assert [t.text for t in done.tags] == ["fire", "hydrant", "traffic", "light"]


@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("a photo of a cat to the left of a boat", ["photo", "cat", "boat"]),
        ("three butterflies , two boxes and some dishes near the bus", ["butterflies", "boxes", "dishes", "bus"]),
        ("a woman holding an umbrella in front of children", ["woman", "umbrella", "children"]),
        ("", []),
        ("?! 3 of the", []),
    ],
)
def test_the_rules_find_the_heads_of_noun_phrases(caption, nouns):
    (tags,) = RuleNouns(None, compounds=True)([caption])
    assert [t.text for t in tags] == nouns


def test_a_closed_list_of_nouns_is_found_in_every_toy_caption():
    find = RuleNouns(NOUNS, compounds=True)
    for seed in range(60):
        scene = render_scene(seed, size=64)
        (tags,) = find([scene.caption])
        assert {t.text for t in tags} == {s.tag for s in scene.subjects}
        assert {t.span for t in tags} == {s.span for s in scene.subjects}
    assert [t.text for t in find([" ".join(PLURALS.values())])[0]] == list(PLURALS)


def test_of_a_closed_list_names_of_several_words_and_words_that_only_look_like_plurals_are_found():
    listed = ["gas", "lens", "bus", "tomato", "knife", "fire hydrant", "hydrant", "glasses"]
    (tags,) = RuleNouns(listed, compounds=True)(["two fire hydrants, gas, a lens, buses, tomatoes, knives and glasses"])
    assert [t.text for t in tags] == ["fire hydrant", "gas", "lens", "bus", "tomato", "knife", "glasses"]


@given(st.text(max_size=60))
def test_spans_lie_inside_any_caption(caption):
    for tags in [*RuleNouns(None, compounds=True)([caption]), *RuleNouns(None, True, phrases=True)([caption])]:
        for tag in tags:
            assert caption[slice(*tag.span)].lower() == tag.text


def test_too_few_and_too_many_nouns_drop_the_image():
    for caption, reason in (("a mug", Reason.TOO_FEW_TAGS), (" and ".join(["a mug"] * 9), Reason.TOO_MANY_TAGS)):
        verdict = tagged(caption, backend="rules").verdict
        assert verdict and verdict.reason is reason


def test_spacy_takes_common_nouns_only():
    (tags,) = SpacyNouns(PIPELINE, compounds=True)(["Anna quickly paints the old house with a brush"])
    assert [t.text for t in tags] == ["house", "brush"]
