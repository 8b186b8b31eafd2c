"""Subjects, their references, and where they go."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model import ModelError, Subject, place, prepare_reference
from model.reference import fill_holes
from model.subject import stack_subjects

_RED = Image.new("RGB", (40, 20), "red")


def _masked(x1: int, y1: int, x2: int, y2: int) -> Subject:
    mask = np.zeros((20, 40), bool)
    mask[y1:y2, x1:x2] = True
    return Subject(_RED, "mug", mask=mask)


@given(st.integers(0, 6), st.integers(1, 4), st.integers(8, 512), st.integers(8, 512), st.booleans())
def test_boxes_laid_out_lie_inside_and_overlap_nothing(
    count: int, aspect: int, height: int, width: int, given_one: bool
) -> None:
    image = Image.new("RGB", (10 * aspect, 10))
    subjects = [Subject(image, "mug") for _ in range(count)]
    if given_one:
        subjects.append(Subject(image, "dog", box=(0.1, 0.3, 0.4, 0.6)))
    boxes = place(subjects, height, width)
    assert boxes == place(subjects, height, width)
    for x1, y1, x2, y2 in boxes:
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_users_box_comes_first_then_the_references_own() -> None:
    assert place([Subject(_RED, "mug", box=(0, 0, 0.5, 1)), _masked(24, 0, 36, 10)], 64, 64) == [
        (0, 0, 0.5, 1),
        (0.6, 0, 0.9, 0.5),
    ]


def test_an_own_box_in_anothers_place_or_of_the_whole_picture_is_given_another() -> None:
    first, second = place([_masked(0, 0, 20, 20), _masked(10, 0, 30, 20)], 64, 64)
    assert first == (0, 0, 0.5, 1) and second[0] >= 0.5
    (whole,) = place([_masked(0, 0, 40, 20)], 64, 64)
    assert whole == pytest.approx((0.1, 0.3, 0.9, 0.7))


def test_an_own_box_that_leaves_the_others_no_room_is_given_another() -> None:
    first, second = place([_masked(0, 0, 40, 13), _masked(0, 0, 38, 14)], 64, 64)
    assert first == (0, 0, 1, 0.65) and second[1] >= 0.65
    slim = Subject(_RED, "dog", box=(0, 0, 1, 0.3))
    assert all(box[1] >= 0.3 for box in place([_masked(0, 7, 40, 20), _masked(0, 0, 9, 9), slim], 64, 64)[:2])


def test_a_laid_out_box_has_its_subjects_shape_in_pixels() -> None:
    ((x1, y1, x2, y2),) = place([Subject(_RED, "mug")], 64, 128)
    assert (x2 - x1) * 128 / ((y2 - y1) * 64) == pytest.approx(2)


@pytest.mark.parametrize(
    "box", [(-0.1, 0, 0.5, 0.5), (0, 0, 1.5, 1), (0.5, 0, 0.5, 1), (0, 0.9, 1, 0.1), (0, 0, float("nan"), 1)]
)
def test_a_box_outside_the_image_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(ModelError, match="lies not inside the image"):
        place([Subject(_RED, "mug", box=box)], 64, 64)


def test_no_room_is_said_so() -> None:
    with pytest.raises(ModelError, match="no room is left for the dog"):
        place([Subject(_RED, "mug", box=(0, 0, 1, 1)), Subject(_RED, "dog")], 64, 64)


def test_a_reference_is_cut_by_its_mask_with_holes_filled_on_white() -> None:
    image = Image.new("RGB", (40, 40), "blue")
    image.paste("red", (10, 10, 30, 20))
    mask = np.zeros((40, 40), bool)
    mask[10:20, 10:30] = True
    mask[14:16, 18:20] = False
    reference = np.asarray(prepare_reference(image, mask, 32))
    assert reference.shape == (32, 32, 3)
    assert (reference[16, 2:30] == (255, 0, 0)).all()
    assert (reference[:7] == 255).all() and (reference[25:] == 255).all()
    assert fill_holes(mask).sum() == 200


def test_a_reference_can_be_put_on_a_photo_or_keep_its_surroundings_anywhere_at_any_size() -> None:
    image = Image.new("RGB", (40, 40), "blue")
    image.paste("red", (10, 10, 30, 20))
    mask = np.zeros((40, 40), bool)
    mask[10:20, 10:20] = True
    mask[15:20, 20:30] = True
    photo = Image.new("RGB", (7, 9), "green")
    on_photo = np.asarray(prepare_reference(image, mask, 32, background="photo", photo=photo, scale=0.5, center=(0, 1)))
    assert (on_photo[:20] == (0, 128, 0)).all() and (on_photo[:, 17:] == (0, 128, 0)).all()
    assert (on_photo[30, 2] == (255, 0, 0)).all()
    as_it_was = np.asarray(prepare_reference(image, mask, 32, background="original"))
    assert (as_it_was[10, 28] == (255, 0, 0)).all()


def test_a_mask_of_another_size_or_an_empty_one_is_refused() -> None:
    with pytest.raises(ModelError, match="40x20 pixels came with a mask of 20x40"):
        prepare_reference(_RED, np.ones((40, 20), bool), 32)
    with pytest.raises(ModelError, match="empty"):
        prepare_reference(_RED, np.zeros((20, 40), bool), 32)


def test_a_cutouts_transparency_is_its_mask_however_it_is_opened():
    cutout = np.full((8, 8, 4), (9, 9, 9, 0), np.uint8)
    cutout[2:6, 3:7] = (250, 20, 20, 255)
    picture = Image.fromarray(cutout)
    palette = picture.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    for image in (picture, palette):
        mask = Subject(image, "mug").mask_array()
        assert mask is not None
        np.testing.assert_array_equal(mask, cutout[..., 3] > 0)
        references, _, _ = stack_subjects([[Subject(image, "mug")]], (64, 64), 16, "white")
        assert references.amin(dim=(0, 1, 2, 4, 5))[0] >= 240, "what is hidden under the transparency is not drawn"


_SHAPE = np.zeros((20, 40), bool)
_SHAPE[5:15, 10:30] = True


@pytest.mark.parametrize(
    "mask",
    [
        _SHAPE,
        _SHAPE.astype(np.uint8),
        _SHAPE.astype(np.uint8) * 255,
        np.where(_SHAPE, 0.6, 0.4),
        np.where(_SHAPE, 0.6, 0.4).astype(np.float32)[None],
        Image.fromarray(_SHAPE.astype(np.uint8) * 200),
    ],
    ids=["bool", "ones", "bytes", "soft", "channel", "image"],
)
def test_masks_of_all_kinds_are_cut_at_half(mask: Any, tmp_path: Path) -> None:
    np.testing.assert_array_equal(Subject(_RED, "mug", mask=mask).mask_array(), _SHAPE)
    if isinstance(mask, Image.Image):
        mask.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(Subject(_RED, "mug", mask=tmp_path / "mask.png").mask_array(), _SHAPE)


def test_pictures_are_images_paths_or_arrays(tmp_path: Path) -> None:
    _RED.save(tmp_path / "red.png")
    array = np.asarray(_RED)
    for image in (tmp_path / "red.png", str(tmp_path / "red.png"), array, array / 255):
        np.testing.assert_array_equal(np.asarray(Subject(image, "mug").picture), array)
    turned = Image.Exif()
    turned[0x0112] = 6
    _RED.save(tmp_path / "turned.png", exif=turned)
    assert Subject(tmp_path / "turned.png", "mug").picture.size == (20, 40)
    opened = Image.open(tmp_path / "turned.png")
    assert Subject(opened, "mug").picture is opened, "whoever opens a picture decides how it stands"


def test_a_cutout_of_any_kind_is_on_white_even_where_a_mask_is_given(tmp_path: Path) -> None:
    cutout = np.zeros((20, 40, 4), np.uint8)
    cutout[_SHAPE] = (250, 20, 20, 255)
    cutout[5:15, 28:30, 3] = 128
    Image.fromarray(cutout).save(tmp_path / "cutout.png")
    everything = np.ones((20, 40), bool)
    for image in (cutout, cutout / 255, tmp_path / "cutout.png", Image.fromarray(cutout)):
        for mask in (None, everything):
            subject = Subject(image, "mug", mask=mask)
            reference = np.asarray(prepare_reference(subject.picture, subject.mask_array(), 32))
            assert reference[..., 0].min() >= 240, "nothing black shows, neither inside nor at the edge"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": np.zeros((20, 40), bool)}, "mask of the mug: it is empty"),
        ({"mask": np.zeros((20, 40))}, "mask of the mug: it is empty"),
        ({"image": Image.new("RGBA", (4, 4))}, "mask of the mug: it is empty"),
        ({"mask": np.full((20, 40), 3.0)}, "mask of the mug: an array of float64 that leaves 0..1"),
        ({"mask": np.full((20, 40), np.nan)}, "leaves 0..1"),
        ({"mask": np.ones((20, 40, 3), bool)}, r"mask of the mug: an array of shape \(20, 40, 3\)"),
        ({"image": np.zeros((20, 40), np.uint8)}, r"image of the mug: an array of shape \(20, 40\)"),
        ({"image": np.zeros((20, 40, 3), np.int64)}, "image of the mug: an array of int64"),
        ({"image": "nowhere.png"}, "image of the mug: .*No such file"),
        ({"mask": "nowhere.png"}, "mask of the mug: .*No such file"),
    ],
)
def test_what_is_no_picture_or_no_mask_is_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        Subject(**{"image": _RED, "tag": "mug"} | given).mask_array()  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_an_inverted_mask_is_warned_of_and_no_other() -> None:
    with pytest.warns(UserWarning, match="mask of the mug: .* is it inverted"):
        Subject(_RED, "mug", mask=~_SHAPE).mask_array()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mask in (_SHAPE, np.ones((20, 40), bool)):
            Subject(_RED, "mug", mask=mask).mask_array()
