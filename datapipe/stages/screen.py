"""Screening: what can be refused without a model, from the image itself and from the scores that came with the row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from datapipe.images import ImageRefusedError, normalise
from datapipe.schema import Reason, Sample, StageName
from datapipe.settings import Settings


class ScreenSettings(Settings):
    """Limits on single images, and how near two images must be to count as one."""

    min_long_side_px: int = Field(600, ge=1)
    """Longer side of the image as fetched, pixels. Released code: width or height at least 600."""
    min_short_side_px: int = Field(64, ge=1)
    """Shorter side of the image as fetched, pixels. Inferred: below it no entity has pixels enough."""
    min_aspect: float = Field(0.33, gt=0)
    """Least width / height. Inferred: banners and skyscrapers are rarely photographs."""
    max_aspect: float = Field(3.0, gt=0)
    """Greatest width / height. Inferred."""
    max_pixels: int = Field(100_000_000, ge=1, le=170_000_000)
    """Refused undecoded above this: a small file can claim gigapixels."""
    max_side_px: int | None = Field(None, ge=64)
    """Images with a longer side are stored smaller, pixels; none: as fetched."""
    white_level: float = Field(0.9, ge=0, le=1)
    """A pixel is white when every channel is above this share of full scale. Released code."""
    max_white_fraction: float = Field(0.1, ge=0, le=1)
    """Share of white pixels above which the background is taken to be white. Released code."""
    max_punsafe: float | None = Field(None, ge=0, le=1)
    """LAION's probability of unsafe content; none: not looked at. A row without the score passes."""
    max_pwatermark: float | None = Field(None, ge=0, le=1)
    """LAION's probability of a watermark; none: not looked at."""
    min_aesthetic: float | None = None
    """LAION's or COYO's aesthetic score; none: not looked at."""
    min_similarity: float | None = Field(None, ge=-1, le=1)
    """CLIP similarity of image and alt text that came with the row; none: not looked at."""
    exact_duplicates: bool = True
    """Drop rows whose bytes (SHA-256) an earlier row of the whole input had. Near duplicates include them."""
    near_duplicate_bits: int | None = Field(4, ge=0, le=10)
    """Drop rows whose 64-bit perceptual hash differs from an earlier one in at most this many bits; none: keep them."""


class ScreenStage:
    """Leaves each image normalised and hashed, or gives it a verdict. Duplicates need the whole input: see
    `duplicates`."""

    name = StageName.SCREEN
    micro_batch = 16

    def __init__(self, settings: ScreenSettings) -> None:
        self.settings = settings

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        return [self._screen(s) for s in samples]

    def _screen(self, sample: Sample) -> Sample:
        data = sample.image or b""
        settings = self.settings
        try:
            image = normalise(data, settings.max_pixels, settings.max_side_px)
        except ImageRefusedError as refused:
            return sample.replace(image=None).dropped(self.name, refused.reason, refused.detail)
        height, width = image.pixels.shape[:2]
        sample = sample.replace(
            image=image.data,
            width=width,
            height=height,
            original_width=image.original_width,
            original_height=image.original_height,
            sha256=sample.sha256 or hashlib.sha256(data).hexdigest(),
            phash=perceptual_hash(image.pixels),
        )
        objection = next(self._objections(sample, image.pixels), None)
        return sample if objection is None else sample.replace(image=None).dropped(self.name, *objection)

    def _objections(self, sample: Sample, pixels: NDArray[np.uint8]) -> Iterator[tuple[Reason, str]]:
        s = self.settings
        width, height = sample.original_width, sample.original_height
        if max(width, height) < s.min_long_side_px or min(width, height) < s.min_short_side_px:
            yield Reason.TOO_SMALL, f"{width} x {height} px"
        if not s.min_aspect <= width / height <= s.max_aspect:
            yield Reason.ASPECT, f"width / height {width / height:.3f}"
        limits = (
            ("punsafe", s.max_punsafe, 1),
            ("pwatermark", s.max_pwatermark, 1),
            ("aesthetic", s.min_aesthetic, -1),
            ("similarity", s.min_similarity, -1),
        )
        scores = dict(sample.scores)
        for name, limit, sign in limits:
            if limit is not None and name in scores and sign * scores[name] > sign * limit:
                yield Reason.SCORE_COLUMN, f"{name} {scores[name]:.4g}, limit {limit:g}"
        red, green, blue = (pixels[..., channel] > s.white_level * 255 for channel in range(3))
        white = float((red & green & blue).mean())
        if white > s.max_white_fraction:
            yield Reason.WHITE_BACKGROUND, f"{white:.3f} of the pixels are white"


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    """64-bit DCT hash of (H, W, 3) uint8 RGB, as ImageHash's `phash` packs it, most significant bit first."""
    bits = imagehash.phash(Image.fromarray(pixels)).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
