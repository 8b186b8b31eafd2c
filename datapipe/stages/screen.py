"""Screening: drops what can be dropped without a model, by the image itself and the scores that came with the row."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from datapipe.decoding import NormalImage, normalize, strips
from datapipe.image_file import ImageRefusedError
from datapipe.schema import Reason, Sample, StageName, decisive
from datapipe.stages.blocklist import read_blocklist
from datapipe.stages.stage import Phase, StageSettings
from subject_diffusion.settings import ADDED_LATER

RECORDED = "sha256:"
"""Begins what stands for the lists of `hash_blocklist` in the record of a run."""


class ScreenSettings(StageSettings):
    """Limits on single images, and how similar two images must be to count as duplicates."""

    phase: ClassVar[Phase] = "fetch"

    @property
    def seeks_duplicates(self) -> bool:
        """Among the images of the whole dataset."""
        return self.exact_duplicates or self.near_duplicate_bits is not None

    min_long_side_px: int = Field(600, ge=1)
    """Minimum longer side of the image as fetched, in pixels. Released code: width or height at least 600."""
    min_short_side_px: int = Field(64, ge=1)
    """Minimum shorter side of the image as fetched, in pixels. Inferred: below it, entities have too few pixels."""
    min_aspect: float = Field(0.33, gt=0)
    """Minimum width / height. Inferred: banners and skyscrapers are rarely photographs."""
    max_aspect: float = Field(3.0, gt=0)
    """Maximum width / height. Inferred."""
    max_pixels: int = Field(100_000_000, ge=1, le=170_000_000)
    """Maximum width × height. Larger images are dropped undecoded, because a small file can claim gigapixels. A pixel
    of more than 3 bytes in the file counts for more: RGBA and CMYK 4/3, colors of 16 bits 2. Screening holds up to 11
    bytes for each."""
    max_scans: Annotated[int, ADDED_LATER] = Field(100, ge=1)
    """Maximum scans of a JPEG, each of which costs a pass over all pixels. Most progressive ones have about 10."""
    max_side_px: int | None = Field(None, ge=64)
    """Longest side that is stored, in pixels; larger images are shrunk. Default: stored as fetched. Released code:
    3,000, with a short_side_px of 800."""
    short_side_px: int | None = Field(None, ge=64)
    """Shorter side that is stored, in pixels; images are shrunk or enlarged to it, as far as max_side_px allows.
    Default: stored as fetched. Released code: 800."""
    max_missing: float = Field(0.0, ge=0, lt=1)
    """Maximum share of its rows of pixels that a truncated JPEG or PNG may lack; the rows that are there are kept. At 0
    truncated images are dropped."""
    strip_metadata: Annotated[bool, ADDED_LATER] = False
    """Take EXIF, XMP, IPTC, comments and thumbnails, which may tell place, owner and device, out of every stored image;
    pixels and color profile stay bit for bit. What is converted or resized never keeps them."""
    hash_blocklist: Annotated[tuple[str, ...], ADDED_LATER] = ()
    """Files (local, s3:// or gs://) of hashes, one a line, whose images are dropped: SHA-256 of the bytes as fetched
    (64 hexadecimal digits), or perceptual hashes (16), from which an image may differ in near_duplicate_bits."""
    white_level: float = Field(0.9, ge=0, le=1)
    """A pixel is white when every channel is above this share of its full scale. Released code."""
    max_white_fraction: float = Field(0.1, ge=0, le=1)
    """Share of white pixels above which the background counts as white. Released code."""
    max_punsafe: float | None = Field(None, ge=0, le=1)
    """Maximum probability of unsafe content, as LAION gives it; default: ignored. A row without the score passes."""
    max_pwatermark: float | None = Field(None, ge=0, le=1)
    """Maximum probability of a watermark, as LAION gives it; default: ignored."""
    min_aesthetic: float | None = None
    """Minimum aesthetic score, as LAION or COYO gives it; default: ignored."""
    min_similarity: float | None = Field(None, ge=-1, le=1)
    """Minimum CLIP similarity of image and alt text, if the row has it; default: ignored."""
    exact_duplicates: bool = True
    """Drop a row whose image has the same bytes (SHA-256) as an earlier row of the whole input. Near duplicates include
    these."""
    near_duplicate_bits: int | None = Field(4, ge=0, le=10)
    """Drop a row whose 64-bit perceptual hash differs from a larger image's, or an earlier one's of the same size, in
    at most this many bits; null: keep near duplicates."""

    def normalize(self, data: bytes) -> NormalImage:
        """The image as it is stored. Raises ImageRefusedError."""
        return normalize(
            data,
            self.max_pixels,
            self.max_side_px,
            self.short_side_px,
            self.max_missing,
            self.max_scans,
            strip=self.strip_metadata,
        )

    def check(self) -> None:
        read_blocklist(self.hash_blocklist)

    def identity(self) -> dict[str, Any]:
        """A list is what it says, wherever it lies: what is recorded of it is its digest."""
        found = super().identity()
        if self.hash_blocklist and not self.hash_blocklist[0].startswith(RECORDED):
            found["hash_blocklist"] = [f"{RECORDED}{read_blocklist(self.hash_blocklist).digest}"]
        return found

    def build(self) -> ScreenStage:
        return ScreenStage(self)


class ScreenStage:
    """Normalizes and hashes each image, or gives it a verdict. Duplicates need the whole input: see `deduplicate`."""

    name = StageName.SCREEN
    micro_batch = 16

    def __init__(self, settings: ScreenSettings) -> None:
        self.settings = settings
        self._blocklist = read_blocklist(settings.hash_blocklist)

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        return [self._screen(s) for s in samples]

    def _screen(self, sample: Sample) -> Sample:
        data = sample.image or b""
        settings = self.settings
        try:
            image = settings.normalize(data)
        except ImageRefusedError as refused:
            return sample.replace(image=None).dropped(self.name, refused.reason, refused.detail)
        sample = sample.replace(
            image=image.data,
            width=image.width,
            height=image.height,
            original_width=image.original_width,
            original_height=image.original_height,
            sha256=sample.sha256 or hashlib.sha256(data).hexdigest(),
            phash=perceptual_hash(image.pixels),
        )
        objection = next(self._objections(sample, image.pixels), None)
        if objection is None:
            return sample
        if objection[0] is Reason.BLOCKLISTED:  # nothing of it may stay
            return sample.replace(image=None).dropped(self.name, *objection)
        return sample.replace(image=None, thumbnail=thumbnail(image.pixels)).dropped(self.name, *objection)

    def _objections(self, sample: Sample, pixels: NDArray[np.uint8]) -> Iterator[tuple[Reason, str]]:
        s = self.settings
        assert sample.phash is not None
        named = self._blocklist.objection(sample.sha256, sample.phash, s.near_duplicate_bits or 0)
        if named is not None:
            yield Reason.BLOCKLISTED, named
        width, height = sample.original_width, sample.original_height
        if max(width, height) < s.min_long_side_px or min(width, height) < s.min_short_side_px:
            yield Reason.TOO_SMALL, f"{width} x {height} px"
        aspect = width / height
        if not s.min_aspect <= aspect <= s.max_aspect:
            limit = s.min_aspect if aspect < s.min_aspect else s.max_aspect
            yield Reason.ASPECT, f"width / height {decisive(aspect, limit)}, limit {limit:g}"
        limits = (
            ("punsafe", s.max_punsafe, 1),
            ("pwatermark", s.max_pwatermark, 1),
            ("aesthetic", s.min_aesthetic, -1),
            ("similarity", s.min_similarity, -1),
        )
        scores = dict(sample.scores)
        for name, bound, sign in limits:
            if bound is not None and name in scores and sign * scores[name] > sign * bound:
                yield Reason.SCORE_COLUMN, f"{name} {decisive(scores[name], bound)}, limit {bound:g}"
        white = white_share(pixels, s.white_level)
        if white > s.max_white_fraction:
            share = decisive(white, s.max_white_fraction)
            yield Reason.WHITE_BACKGROUND, f"{share} of the pixels are white, limit {s.max_white_fraction:g}"


def white_share(pixels: NDArray[np.uint8], level: float) -> float:
    """Share of (H, W, 3) uint8 RGB pixels of which every channel is above `level`, a share of its full scale."""
    least = math.floor(level * 255) + 1.0
    white = sum(int(cv2.countNonZero(cv2.inRange(strip, (least,) * 3, (255.0,) * 3))) for strip in strips(pixels))
    return white / pixels[..., 0].size


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG of (H, W, 3) uint8 RGB, of at most 160 pixels a side: 3 to 6 KB of a photograph, under 20 KB of noise."""
    height, width = pixels.shape[:2]
    scale = min(1.0, _THUMBNAIL_PX / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    sink = io.BytesIO()
    Image.fromarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)).save(sink, "JPEG", quality=75)
    return sink.getvalue()


_THUMBNAIL_PX = 160


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    """64-bit DCT hash of (H, W, 3) uint8 RGB, as ImageHash's `phash` packs it, most significant bit first."""
    gray = Image.new("L", pixels.shape[1::-1])
    top = 0
    for strip in strips(pixels):
        gray.paste(Image.fromarray(strip).convert("L"), (0, top))
        top += len(strip)
    small = gray.resize((_HASHED_PX, _HASHED_PX), Image.Resampling.LANCZOS)
    lowest = _DCT @ np.asarray(small, np.float64) @ _DCT.T
    # In a picture of one color all but the mean is 0, and so is the median: rounding errors must not become bits.
    lowest = lowest.round(6)
    return int.from_bytes(np.packbits(lowest > np.median(lowest)).tobytes(), "big")


_HASHED_PX = 32
_DCT = 2 * np.cos(np.pi / (2 * _HASHED_PX) * np.outer(np.arange(8), 2 * np.arange(_HASHED_PX) + 1))
"""(8, 32): the eight lowest frequencies of a DCT of type II, scaled as SciPy's."""
