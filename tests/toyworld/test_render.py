"""What is said of a toy scene is exactly what is in it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from toyworld.render import BACKGROUNDS, NOUNS, PLURALS, VOCABULARY, Scene, render_scene, sample_identity
from toyworld.render.web import Flaw, flaw_counts, flaw_rows, render_web_image

SCENES = 60


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(seed, size=(128, 160), split="heldout") for seed in range(SCENES)]


def test_a_seed_always_gives_the_same_scene():
    first, second = render_scene(7, size=128), render_scene(7, size=128)
    assert first.caption == second.caption
    np.testing.assert_array_equal(first.image, second.image)


def test_a_caption_names_exactly_the_nouns_in_the_picture(scenes):
    singular = {plural: noun for noun, plural in PLURALS.items()} | {noun: noun for noun in NOUNS}
    for scene in scenes:
        named = {singular[word] for word in scene.caption.split() if word in singular}
        assert named == {s.tag for s in scene.subjects}
        assert set(scene.caption.split()) <= set(VOCABULARY)


def test_spans_point_at_the_noun_inside_its_phrase(scenes):
    for scene in scenes:
        for subject in scene.subjects:
            assert scene.caption[slice(*subject.span)] in (subject.tag, PLURALS[subject.tag])
            assert subject.phrase_span[0] <= subject.span[0] <= subject.span[1] == subject.phrase_span[1]
            assert subject.phrase == scene.caption[slice(*subject.phrase_span)]


def test_counts_are_true(scenes):
    numbers = {"two": 2, "three": 3, "four": 4}
    for scene in scenes:
        for subject in scene.subjects:
            alike = sum(s.tag == subject.tag for s in scene.subjects)
            assert numbers.get(subject.phrase.split()[0], 1) == alike


def test_boxes_are_tight_around_visible_masks_that_do_not_overlap(scenes):
    for scene in scenes:
        assert np.sum([s.mask for s in scene.subjects], axis=0).max() == 1
        for subject in scene.subjects:
            ys, xs = np.nonzero(subject.mask)
            assert subject.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_subjects_pass_the_papers_entity_rules(scenes):
    for scene in scenes:
        height, width = scene.image.shape[:2]
        for x1, y1, x2, y2 in (s.box for s in scene.subjects):
            assert 0.08 < (x2 - x1) * (y2 - y1) / (height * width) < 0.7
            assert 0.3 < (x2 - x1) / (y2 - y1) < 3


def test_relations_are_true():
    checked = 0
    for seed in range(150):
        scene = render_scene(seed, size=128)
        if len(scene.subjects) != 2:
            continue
        a, b = sorted(scene.subjects, key=lambda s: s.span)
        ax, ay, bx, by = (a.box[0] + a.box[2], a.box[1] + a.box[3], b.box[0] + b.box[2], b.box[1] + b.box[3])
        for words, true in (("left of", ax < bx), ("right of", ax > bx), ("above", ay < by), ("below", ay > by)):
            if words in scene.caption:
                checked += 1
                assert true, scene.caption
    assert checked > 10


def test_the_splits_share_no_identity():
    train = {sample_identity(noun, i, "train") for noun in NOUNS for i in range(20)}
    heldout = {sample_identity(noun, i, "heldout") for noun in NOUNS for i in range(20)}
    assert len(train) == len(heldout) == 20 * len(NOUNS)
    assert not train & heldout


def test_an_identity_is_recognizable_in_another_scene():
    def colors_of(identity, seed):
        scene = render_scene(seed, size=192, identities=[identity])
        pixels = scene.image[scene.subjects[0].mask]
        histogram = np.histogramdd(pixels, bins=(6, 6, 6), range=((0, 256),) * 3)[0]
        return histogram.ravel() / histogram.sum()

    mugs = [sample_identity("mug", i, "heldout") for i in range(6)]
    once, again = ([colors_of(mug, seed + i) for i, mug in enumerate(mugs)] for seed in (100, 200))
    similarity = np.array([[np.minimum(a, b).sum() for b in again] for a in once])
    assert (similarity.argmax(1) == np.arange(6)).all()


def test_every_flaw_comes_as_often_as_stated_and_duplicates_follow_their_original():
    rows = flaw_rows(200, seed=3)
    for flaw, count in flaw_counts(200).items():
        assert list(rows.values()).count(flaw) == count
    for row, flaw in rows.items():
        image = render_web_image(row, 200, 3)
        assert image.flaw is flaw
        assert (image.jpeg is None) == (flaw is Flaw.DEAD_URL)
        if image.duplicate_of is not None:
            assert image.duplicate_of < row
            assert image.duplicate_of not in rows


def test_unflawed_images_are_not_white_and_flawed_ones_are():
    for row in range(30):
        image = render_web_image(row, 200, 3)
        if image.flaw not in (None, Flaw.WHITE_BACKGROUND) or image.jpeg is None:
            continue
        pixels = cv2.imdecode(np.frombuffer(image.jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        white = (pixels > 0.9 * 255).all(-1).mean()
        assert (white > 0.1) == (image.flaw is Flaw.WHITE_BACKGROUND)


def test_every_background_is_drawn(scenes):
    assert {s.background for s in scenes} == set(BACKGROUNDS)
