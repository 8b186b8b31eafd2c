"""Every reason of the screen, by an image made for it."""

from __future__ import annotations

import io

import imagehash
import numpy as np
import pytest
from PIL import Image

from datapipe.schema import Reason, Sample
from datapipe.stages.screen import ScreenSettings, ScreenStage, perceptual_hash
from tests.conftest import jpeg

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


def test_a_good_image_goes_on_normalised_and_hashed():
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


def test_a_white_margin_within_the_limit_passes():
    assert screened(plain(200, 200, (80, 90, 100), white_share=0.08)).verdict is None


def test_a_row_without_scores_passes_their_limits():
    assert screened(jpeg(200, 200)).verdict is None


def test_the_perceptual_hash_is_the_librarys():
    pixels = np.asarray(Image.open(io.BytesIO(jpeg(64, 64))))
    assert f"{perceptual_hash(pixels):016x}" == str(imagehash.phash(Image.fromarray(pixels)))
