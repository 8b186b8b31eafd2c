"""What is measured beyond the paper, on pictures whose answer is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datapipe.recipe import load_recipe
from model import Subject
from tests.toy import TOY_RECIPE
from tests.train.evaluation.scenes import case_of
from toyworld.render import render_scene, sample_identity
from train.evaluation.beyond import COLORS, _recolored, area_under, confusion, largest_step, nearer, overlap
from train.evaluation.cases import Case
from train.evaluation.cutout import Cutout
from train.evaluation.metrics import Locator


def shown(*nouns: str, seed: int = 0) -> Case:
    individuals = [sample_identity(noun, number, "heldout") for number, noun in enumerate(nouns)]
    scene = render_scene(seed, size=128, split="heldout", identities=individuals)
    return case_of(scene)


def painted(rgb: tuple[int, int, int], mask: np.ndarray | None = None) -> Cutout:
    if mask is None:
        mask = np.zeros((20, 20), bool)
        mask[5:15, 5:15] = True
    return Cutout(Image.new("RGB", (20, 20), rgb), mask)


def test_subjects_are_confused_when_each_looks_like_the_others_reference():
    locate = Locator(load_recipe(TOY_RECIPE))
    case = shown("mug", "fish")
    assert confusion(case, case.image, locate) == 0
    one, other = case.subjects
    crossed = (
        dataclasses.replace(one, image=other.image, mask=other.mask),
        dataclasses.replace(other, image=one.image, mask=one.mask),
    )
    assert confusion(dataclasses.replace(case, subjects=crossed), case.image, locate) == 1


def test_the_largest_step_is_1_for_even_steps_and_their_number_for_one_leap():
    def grays(*values: int) -> list[Image.Image]:
        return [Image.new("RGB", (4, 4), (v, v, v)) for v in values]

    assert largest_step(grays(0, 10, 20, 30)) == pytest.approx(1)
    assert largest_step(grays(0, 0, 0, 90)) == pytest.approx(3)
    assert largest_step(grays(5, 5, 5)) == 1


def test_an_edit_is_followed_by_as_much_as_the_color_came_nearer():
    blue = COLORS["blue"]
    assert nearer(painted((215, 50, 45)), painted(blue), blue) == pytest.approx(1, abs=0.02)
    assert nearer(painted((215, 50, 45)), painted((215, 50, 45)), blue) == pytest.approx(0)
    assert nearer(painted((60, 110, 200)), painted((215, 50, 45)), blue) < 0


def test_silhouettes_overlap_whatever_their_place_and_size():
    square, wide = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    square[20:30, 20:30], wide[20:25, 10:30] = True, True
    assert overlap(painted((1, 2, 3)), Cutout(Image.new("RGB", (40, 40), (1, 2, 3)), square)) == pytest.approx(1)
    assert overlap(painted((1, 2, 3)), Cutout(Image.new("RGB", (40, 40), (1, 2, 3)), wide)) == pytest.approx(
        0.25, abs=0.05
    )


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red mug and a fish", "a {} mug and a fish"),
        ("a mug on a mat", "a {} mug on a mat"),
        ("A smug Red Mug", "A smug {} Mug"),
    ],
)
def test_another_color_stands_in_the_caption_in_place_of_its_own(caption, expected):
    image = Image.new("RGB", (20, 20), (215, 50, 45))
    case = Case(
        image, caption, (Subject(image, "mug", mask=np.ones((20, 20), bool), box=(0, 0, 1, 1)),), (("", "", 0),)
    )
    changed, color = _recolored(case)
    assert color != "red" and changed.caption == expected.format(color)


@given(st.lists(st.tuples(st.integers(-2, 9), st.integers(-2, 9)), min_size=1, max_size=6))
def test_the_area_is_that_of_all_rectangles_together(points):
    covered = sum(any(x > i and y > j for x, y in points) for i in range(9) for j in range(9))
    assert area_under([(float(x), float(y)) for x, y in points]) == pytest.approx(covered)
