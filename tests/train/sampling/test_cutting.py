"""A reference without a mask is cut out where it is clicked, inside its box, or by its name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from datapipe.recipe import load_recipe
from tests.toy import TOY_RECIPE
from train.sampling.cutting import Cutter, Mask, around
from train.sampling.drawing import read_drawing
from train.sampling.page.studio import CUT_PX, enlarged, smaller


@pytest.fixture(scope="module")
def cut() -> Cutter:
    return Cutter(load_recipe(TOY_RECIPE))


def overlap(found: Mask, true: Mask) -> float:
    return float((found & true).sum() / (found | true).sum())


def middle(mask: Mask) -> tuple[float, float]:
    """A pixel of the mask that is far from its edge, 0..1."""
    rows, columns = np.nonzero(mask)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return (columns[nearest] + 0.5) / mask.shape[1], (rows[nearest] + 0.5) / mask.shape[0]


def test_a_name_a_click_or_a_box_finds_the_subject(cut, scene):
    picture = Image.fromarray(scene.image)
    for subject in scene.subjects:
        x1, y1, x2, y2 = (v / 192 for v in subject.box)
        for at in (None, middle(subject.mask), (x1, y1, x2, y2)):
            assert overlap(cut(picture, subject.tag, at), subject.mask) > 0.7, (subject.tag, at)


def test_a_click_on_what_its_name_does_not_tell_is_segmented_all_the_same(cut, scene):
    mug = scene.subjects[0]
    at = middle(mug.mask)
    found = cut(Image.fromarray(scene.image), "zeppelin", at)
    assert found[int(at[1] * 192), int(at[0] * 192)] and overlap(found, mug.mask) > 0.4


def test_of_several_the_largest_is_taken(cut, scene):
    half = Image.fromarray(scene.image).resize((96, 96))
    both = Image.new("RGB", (288, 192), "gray")
    both.paste(half, (0, 48))
    both.paste(Image.fromarray(scene.image), (96, 0))
    found = cut(both, "fish", None)
    assert found[:, 96:].sum() > 0.9 * found.sum() > 0


def test_where_there_is_nothing_nothing_is_found(cut):
    assert cut(Image.new("RGB", (64, 48), "gray"), "mug", None) is None


def test_squares_around_a_click_end_at_the_pictures_sides():
    boxes = around((0.0, 1.0), (200, 100))
    assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in boxes)
    assert boxes[0] == pytest.approx((0, 0.85, 0.075, 1))


def test_the_command_cuts_out_what_comes_without_a_mask(sdd, run, pictures, scene):
    x, y = middle(scene.subjects[1].mask)
    words = ("--subject", "mug=scene.png", "--subject", "fish=scene.png", "--at", f"fish={x},{y}", "--images", "1")
    code, _, error = sdd("sample", "a mug and a fish", "--run", run, "--out", "drawn", *words)
    assert code == 0, error
    drawing = read_drawing(pictures / "drawn/seed-0.png")
    for drawn, true in zip(drawing.subjects, scene.subjects, strict=True):
        assert overlap(drawn.references[0].rle().array(), true.mask) > 0.7


def test_nothing_is_written_where_a_subject_is_not_found(refused, run, pictures):
    Image.new("RGB", (64, 48), "gray").save("plain.png")
    words = ("--subject", "fish=plain.png", "--out", "drawn")
    error = refused("sample", "a fish", "--run", run, *words)
    assert "plain.png: no fish was found there" in error and "--at fish=X,Y" in error
    assert not (pictures / "drawn").exists()


def test_a_large_upload_is_cut_out_at_the_size_that_the_segmenter_sees(cut, scene):
    large = Image.fromarray(scene.image).resize((2400, 2400), Image.Resampling.BICUBIC)
    shown = smaller(large)
    assert shown.size == (CUT_PX, CUT_PX) and large.size == (2400, 2400)
    mug = scene.subjects[0]
    found = cut(shown, mug.tag, middle(mug.mask))
    assert found is not None
    true = np.asarray(Image.fromarray(mug.mask).resize(large.size, Image.Resampling.NEAREST))
    assert overlap(enlarged(found, large.size), true) > 0.7
    small = Image.fromarray(scene.image)
    assert smaller(small).size == small.size
