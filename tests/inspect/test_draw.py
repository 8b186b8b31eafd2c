"""Pictures show the entities where they are, large enough to read."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from datapipe.inspect import contact_sheet, draw_sample
from datapipe.inspect.draw import LONG_SIDE_PX
from datapipe.schema import Reason, Sample, StageName
from subject_diffusion.errors import ShardError
from tests.conftest import jpeg, kept_sample


def gray(width: int, height: int) -> bytes:
    """A JPEG of one gray."""
    sink = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(sink, "JPEG")
    return sink.getvalue()


def touched(picture: Image.Image, width: int, height: int) -> NDArray[np.bool_]:
    """Where the image part of a picture is no longer gray."""
    pixels = np.asarray(picture)[:height, :width].astype(int)
    far: NDArray[np.bool_] = np.abs(pixels - 128).max(2) > 8
    return far


def test_small_images_are_enlarged():
    picture = draw_sample(kept_sample(0))
    assert picture.width == LONG_SIDE_PX
    assert picture.height > LONG_SIDE_PX * 32 / 48


def test_large_images_keep_their_size():
    sample = kept_sample(0).replace(image=jpeg(900, 600), width=900, height=600, candidates=())
    assert draw_sample(sample).width == 900


def test_box_mask_and_label_stand_where_the_entity_is():
    sample = kept_sample(0).replace(image=gray(48, 32))
    scale = LONG_SIDE_PX // 48
    changed = touched(draw_sample(sample), 48 * scale, 32 * scale)
    x1, y1, x2, y2 = (round(v * scale) for v in sample.entities[0].box)
    assert changed[y1 : y2 + 1, x1 : x2 + 1].all()
    changed[: y2 + 3, : x2 + 60] = False  # the box, and the label above it
    assert not changed.any()


def test_refused_candidates_are_not_drawn():
    sample = kept_sample(0).replace(image=gray(48, 32))
    refused = sample.replace(candidates=sample.candidates[1:])
    assert not touched(draw_sample(refused), LONG_SIDE_PX, LONG_SIDE_PX * 32 // 48).any()


def test_of_a_lost_row_every_candidate_is_drawn():
    sample = kept_sample(0).replace(image=gray(48, 32))
    lost = sample.replace(candidates=sample.candidates[1:]).dropped(StageName.SELECT, Reason.TOO_FEW_ENTITIES)
    assert touched(draw_sample(lost), LONG_SIDE_PX, LONG_SIDE_PX * 32 // 48).any()


@pytest.mark.parametrize("caption", ["", "a mug", "x" * 300, "漢字 ☕ " * 40])
def test_any_caption_and_tag_can_be_drawn(caption):
    entity = dataclasses.replace(kept_sample(0).entities[0], tag=caption)
    picture = draw_sample(kept_sample(0).replace(caption=caption, candidates=(entity,)))
    assert picture.width == LONG_SIDE_PX


def test_a_word_longer_than_the_picture_is_broken():
    short, long = (draw_sample(kept_sample(0).replace(caption="x" * n)) for n in (3, 300))
    assert long.height > short.height


def test_a_contact_sheet_holds_every_sample():
    one, full, five = (contact_sheet([kept_sample(i) for i in range(n)], "toy", "counts") for n in (1, 4, 5))
    assert one.size == full.size  # the columns are there, filled or not
    assert five.height > full.height


def test_a_contact_sheet_has_a_title_and_counts_of_any_length():
    plain, titled, long = (
        np.asarray(contact_sheet([kept_sample(0)], title, "")) for title in ("", "toy", "a long name " * 99)
    )
    assert plain.shape == titled.shape == long.shape
    changed = np.flatnonzero((plain != titled).any((1, 2)))
    assert 0 < changed.min() <= changed.max() < 64, "above the pictures"
    assert not (plain != long)[:, -8:].any(), "it is cut before the edge"


def test_a_tall_image_does_not_stretch_its_row():
    tall = kept_sample(0).replace(image=jpeg(20, 200), width=20, height=200, candidates=())
    assert contact_sheet([tall], "toy", "counts", column_px=300).height < 2 * 300


def test_a_row_without_an_image_says_what_became_of_it():
    lost = Sample(row=3).failed(StageName.FETCH, Reason.TIMEOUT, "after 10 s")
    with pytest.raises(ShardError, match="failed at fetch: timeout after 10 s"):
        draw_sample(lost)
