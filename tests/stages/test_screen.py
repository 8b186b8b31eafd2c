"""Every reason of the screen, by an image made for it."""

from __future__ import annotations

import contextlib
import io
import re

import imagehash
import numpy as np
import pytest
from PIL import Image

from datapipe.schema import Reason, Sample
from datapipe.stages.screen import ScreenSettings, ScreenStage, perceptual_hash
from tests.conftest import jpeg
from toyworld.render.web import render_web_image

SETTINGS = ScreenSettings(
    min_long_side_px=100,
    max_punsafe=0.5,
    max_pwatermark=0.8,
    min_aesthetic=4.5,
    min_similarity=0.28,
    max_pixels=1_000_000,
)


def screened(data: bytes, **scores: float) -> Sample:
    (sample,) = ScreenStage(SETTINGS)([Sample(row=0, image=data, scores=tuple(sorted(scores.items())))])
    return sample


def plain(width: int, height: int, color: tuple[int, int, int], white_share: float = 0.0) -> bytes:
    image = Image.new("RGB", (width, height), color)
    image.paste((255, 255, 255), (0, 0, round(width * white_share), height))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def test_a_good_image_goes_on_normalized_and_hashed():
    sample = screened(plain(160, 120, (80, 90, 100)))
    assert sample.verdict is None
    assert sample.image and sample.image.startswith(b"\xff\xd8")
    assert (sample.width, sample.height, sample.original_width, sample.original_height) == (160, 120, 160, 120)
    assert len(sample.sha256) == 64
    assert sample.phash is not None


@pytest.mark.parametrize(
    ("data", "scores", "reason"),
    [
        (plain(90, 80, (80, 90, 100)), {}, Reason.TOO_SMALL),
        (plain(200, 20, (80, 90, 100)), {}, Reason.TOO_SMALL),
        (plain(400, 70, (80, 90, 100)), {}, Reason.ASPECT),
        (plain(70, 400, (80, 90, 100)), {}, Reason.ASPECT),
        (plain(200, 200, (80, 90, 100), white_share=0.12), {}, Reason.WHITE_BACKGROUND),
        (plain(1001, 1000, (80, 90, 100)), {}, Reason.TOO_MANY_PIXELS),
        (b"<html>", {}, Reason.UNSUPPORTED_FORMAT),
        (jpeg(200, 200)[:300], {}, Reason.UNDECODABLE),
        (jpeg(200, 200), {"punsafe": 0.9}, Reason.SCORE_COLUMN),
        (jpeg(200, 200), {"pwatermark": 0.9}, Reason.SCORE_COLUMN),
        (jpeg(200, 200), {"aesthetic": 4.0}, Reason.SCORE_COLUMN),
        (jpeg(200, 200), {"similarity": 0.1}, Reason.SCORE_COLUMN),
    ],
)
def test_what_is_refused_and_why(data, scores, reason):
    sample = screened(data, **scores)
    assert sample.verdict is not None
    assert sample.verdict.reason is reason
    assert sample.image is None
    assert sample.verdict.detail


def noise(width: int, height: int) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 4] = 255
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize(("width", "height"), [(200, 100), (300, 900), (101, 34), (1000, 500)])
def test_an_image_that_screening_drops_leaves_a_small_picture(width, height):
    once, again = (screened(noise(width, height)).thumbnail for _ in range(2))
    assert once is not None
    assert once == again
    assert len(once) < 20_000
    left = Image.open(io.BytesIO(once))
    assert max(left.size) == min(160, max(width, height))
    assert left.width / left.height == pytest.approx(width / height, rel=0.05)


def test_an_image_that_cannot_be_decoded_leaves_none():
    assert screened(b"<html>").thumbnail is None
    assert screened(plain(160, 120, (80, 90, 100))).thumbnail is None, "it was not dropped"


def test_the_detail_has_the_digits_that_decide():
    settings = ScreenSettings(min_long_side_px=100, max_white_fraction=0.25)
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels.reshape(-1, 3)[:10_001] = 255
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    (sample,) = ScreenStage(settings)([Sample(row=0, image=sink.getvalue())])
    assert sample.verdict is not None
    told = re.fullmatch(r"([\d.]+) of the pixels are white, limit 0.25", sample.verdict.detail)
    assert told is not None
    assert float(told[1]) > 0.25


def test_a_white_margin_within_the_limit_passes():
    assert screened(plain(200, 200, (80, 90, 100), white_share=0.08)).verdict is None


def test_a_row_without_scores_passes_their_limits():
    assert screened(jpeg(200, 200)).verdict is None


def pictures_to_hash() -> list[Image.Image]:
    """Drawn ones, noise of several shapes, a gradient and a single color."""
    drawn = []
    for row in range(60):
        with contextlib.suppress(OSError):  # some of the toy web's pictures are broken
            drawn.append(Image.open(io.BytesIO(render_web_image(row, 60, seed=3).jpeg or b"")).convert("RGB"))
    gradient = Image.linear_gradient("L").resize((90, 60))
    return [*drawn, *(Image.open(io.BytesIO(jpeg(w, h))) for w, h in ((64, 64), (31, 200), (33, 7))), gradient]


def test_the_perceptual_hash_is_the_librarys():
    for picture in [*pictures_to_hash(), Image.new("RGB", (50, 40), (7, 80, 160))]:
        picture = picture.convert("RGB")
        assert f"{perceptual_hash(np.asarray(picture)):016x}" == str(imagehash.phash(picture))
