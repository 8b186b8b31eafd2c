"""Scores tell a subject from another of the same noun, and a report says what was measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from datapipe.pairs.settings import EmbedSettings
from datapipe.recipe import load_recipe
from subject_diffusion.errors import RunError
from tests.toy import TOY_RECIPE
from tests.train.datasets import sample, write_dataset
from tests.train.evaluation.scenes import case_of
from toyworld.render import Scene, render_scene, sample_identity
from train.evaluation.cases import _close_up, load_cases
from train.evaluation.evaluate import shuffled
from train.evaluation.individuals import Individuals
from train.evaluation.metrics import METRICS, Clip, Locator, score_subjects
from train.evaluation.report import Evaluation, Report, Scored, grouped
from train.stream.tar_sample import RawSample
from train.trainer.recipe import ExampleSettings, ValidationSettings

NOUNS = ("mug", "fish", "house", "penguin")


@pytest.fixture(scope="module")
def locate() -> Locator:
    return Locator(load_recipe(TOY_RECIPE))


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip("toyworld/weights/clip")


def scene(noun: str, identity: int, seed: int) -> Scene:
    return render_scene(seed, size=128, split="heldout", identities=[sample_identity(noun, identity, "heldout")])


@pytest.fixture(scope="module")
def individuals() -> Individuals:
    return Individuals(EmbedSettings(), [case_of(scene(noun, i, seed=100 + i)) for noun in NOUNS for i in range(9)])


def test_a_subject_is_looked_for_under_whole_words_of_the_caption_in_any_case(locate):
    shown = case_of(scene("fish", 0, seed=1))
    (mask,) = locate(shown.image, "A fishbowl with a Fish", shown.subjects)
    assert mask is not None
    with pytest.raises(RunError, match="does not name the subject 'fish'"):
        locate(shown.image, "a fishbowl", shown.subjects)


def test_the_same_subject_elsewhere_scores_better_than_another_of_its_noun(locate, clip, individuals):
    same: list[dict[str, float]] = []
    other: list[dict[str, float]] = []
    for noun in NOUNS:
        for identity in range(3):
            reference = case_of(scene(noun, identity, seed=identity))
            for scores, which in ((same, identity), (other, identity + 10)):
                drawn = case_of(scene(noun, which, seed=50 + identity))
                scores += score_subjects(reference, drawn.image, locate, clip, individuals)
    mean = {m: [np.mean([s[m] for s in scores]) for scores in (same, other)] for m in METRICS}
    assert mean["found"][0] > 0.9
    assert mean["identity"][0] > 0.8 and mean["identity"][1] < 0.2
    assert mean["identity by color"][0] > 0.9 and mean["identity by color"][1] < 0.25
    assert mean["clip"][0] > mean["clip"][1] + 0.1
    assert mean["color"][0] < 0.5 * mean["color"][1]
    assert mean["pattern"][0] < mean["pattern"][1]


def test_a_picture_scored_against_itself_is_perfect(locate, clip, individuals):
    reference = case_of(scene("mug", 0, seed=0))
    (score,) = score_subjects(reference, reference.image, locate, clip, individuals)
    assert score["identity"] == score["identity by color"] == 1
    assert score["clip"] > 0.95
    assert score["color"] < 3
    assert score["pattern"] < 10


def test_a_subject_that_is_not_there_is_scored_where_it_was_asked_for(locate, clip, individuals):
    reference = case_of(scene("mug", 0, seed=0))
    empty = Image.new("RGB", (128, 128), (90, 120, 90))
    (score,) = score_subjects(reference, empty, locate, clip, individuals)
    assert score["found"] == 0
    assert score["clip"] < 0.7


def test_shuffling_keeps_tags_and_boxes_and_takes_the_same_noun_where_there_is_one():
    cases = [case_of(scene(noun, i, seed=i)) for i, noun in enumerate(["mug", "fish", "mug"])]
    first, lonely, last = shuffled(cases)
    assert first.subjects[0].image is cases[2].image
    assert last.subjects[0].image is cases[0].image
    assert lonely.subjects[0].image is not cases[1].image
    for before, after in zip(cases, (first, lonely, last), strict=True):
        assert (after.subjects[0].tag, after.subjects[0].box) == (before.subjects[0].tag, before.subjects[0].box)


def test_a_reference_is_told_from_seven_others_of_its_noun(individuals):
    shown = case_of(scene("mug", 3, seed=0))
    (name,) = shown.individuals
    rivals = individuals.rivals("mug", name)
    assert len(rivals) == 7 and individuals.chance(shown) == pytest.approx(1 / 8)
    own = individuals.embedding(shown.subjects[0].picture, shown.subjects[0].mask)
    assert all(rival.embedding @ own < 0.999 for rival in rivals)
    assert len(individuals.rivals("boat", name)) == 0


def test_shuffling_gives_nobody_their_own_reference_from_another_image():
    first, again, other = (case_of(scene("mug", who, seed)) for who, seed in ((0, 0), (0, 1), (5, 2)))
    changed, *_ = shuffled([first, again, other])
    assert changed.subjects[0].image is other.image


def test_a_thin_subject_stays_in_its_close_up():
    mask = np.zeros((600, 600), bool)
    for i in range(600):
        mask[i, max(0, i - 1) : i + 2] = True
    picture, small = _close_up(np.zeros((600, 600, 3), np.uint8), mask, 64)
    assert picture.size == (66, 66) and small.sum() >= 32


def test_a_report_has_means_gains_and_groups():
    rng = np.random.default_rng(0)
    scored = []
    for i in range(20):
        shown = case_of(scene(NOUNS[i % 4], i, seed=i))
        ways = {"subject": 0.8, "shuffled": 0.5, "base": 0.4}
        scores = {
            w: [dict.fromkeys(METRICS, 1.0) | {"clip": mean + rng.normal(0, 0.05), "color": 10 - mean, "pattern": 20.0}]
            for w, mean in ways.items()
        }
        scored.append(Scored(shown, dict.fromkeys(ways, shown.image), scores, dict.fromkeys(ways, 0.5), 0.125))
    found = grouped(scored, new_tags=frozenset({"mug"}))
    assert {name: group.images for name, group in found.items()} == {"all": 20, "new nouns": 5, "known nouns": 15}
    gains = found["all"].gains["subject over base"]
    assert gains["clip"].low < gains["clip"].mean < gains["clip"].high
    assert gains["clip"].mean == pytest.approx(0.4, abs=0.05)
    assert gains["color"].mean == pytest.approx(0.4)
    asked = Evaluation(data="held-out", images=20, labels=load_recipe(TOY_RECIPE))
    report = Report(asked, ValidationSettings(), found)
    assert len(report.tables()) == 3
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_an_image_whose_caption_has_no_subject_as_a_word_is_no_case(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "dataset", (6,))
    cases = load_cases(str(folder), 2, ExampleSettings(size_px=32), (1, 2), tmp_path / "cache")
    assert all(s.tag == "mug" for c in cases for s in c.subjects)  # the captions say "a mug N", whatever else is there
    monkeypatch.setattr(RawSample, "annotation", lambda self: sample(0).replace(caption="two mugs"))
    with pytest.raises(RunError, match="0 of its images show 1 subject"):
        load_cases(str(folder), 2, ExampleSettings(size_px=32), (1, 2), tmp_path / "cache")
