"""Toy scenes as the web would have them: JPEGs of many sizes with alt texts, some of them made to be dropped."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum

import cv2
import numpy as np
from numpy.typing import NDArray

from toyworld.render.identity import Split
from toyworld.render.scene import IDENTITIES_PER_NOUN, Scene, render_scene
from toyworld.render.textures import BACKGROUNDS, texture


class Flaw(Enum):
    """What is wrong with an image, and so why it must not be kept."""

    WHITE_BACKGROUND = "white_background"
    TOO_SMALL = "too_small"
    NO_SUBJECT = "no_subject"
    CORRUPT_JPEG = "corrupt_jpeg"
    EXACT_DUPLICATE = "exact_duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    DEAD_URL = "dead_url"


SHARE_OF_EACH_FLAW = 0.021
SIZES_PX = (128, 256)
SMALL_PX = 48


@dataclass(frozen=True)
class WebImage:
    """`jpeg`: None for a dead URL. `scene`: the truth, None where there is none to be found. `duplicate_of`: a row."""

    jpeg: bytes | None
    alt_text: str
    flaw: Flaw | None
    scene: Scene | None
    duplicate_of: int | None = None


def flaw_counts(count: int) -> dict[Flaw, int]:
    """How many of `count` web images have each flaw; at least one of each."""
    return {flaw: max(1, round(SHARE_OF_EACH_FLAW * count)) for flaw in Flaw}


@functools.cache
def flaw_rows(count: int, seed: int) -> dict[int, Flaw]:
    """Which rows are flawed. Row 0 never is, so that every duplicate has an original before it."""
    rng = np.random.default_rng(np.random.SeedSequence([0xF1A, count, seed]))
    rows = iter(rng.permutation(np.arange(1, count)))
    return {int(next(rows)): flaw for flaw, many in flaw_counts(count).items() for _ in range(many)}


def render_web_image(
    row: int, count: int, seed: int, identities: int = IDENTITIES_PER_NOUN, split: Split = "heldout"
) -> WebImage:
    """Row `row` of the toy web (`count`, `seed`, `identities`), by itself. Webs of different seeds share no identity;
    `identities`: of each noun, at most IDENTITIES_PER_NOUN."""
    flaws = flaw_rows(count, seed)
    flaw = flaws.get(row)
    rng = np.random.default_rng(np.random.SeedSequence([0x3EB, seed, row]))
    if flaw in (Flaw.EXACT_DUPLICATE, Flaw.NEAR_DUPLICATE):
        original = int(rng.choice([r for r in range(row) if r not in flaws]))
        return _duplicate(render_web_image(original, count, seed, identities, split), original, flaw, rng)
    height, width = _size(rng)
    if flaw is Flaw.NO_SUBJECT:
        name = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        return WebImage(_jpeg(texture(name, height, width, rng)), f"a photo of {name}", flaw, None)
    first = seed * IDENTITIES_PER_NOUN
    pool = range(first, first + identities)
    scene = render_scene(seed * 1_000_003 + row, size=(height, width), split=split, pool=pool)
    image = scene.image
    if flaw is Flaw.DEAD_URL:
        return WebImage(None, scene.caption, flaw, None)
    if flaw is Flaw.WHITE_BACKGROUND:
        subjects = np.any([s.mask for s in scene.subjects], axis=0)
        image = np.where(subjects[..., None], image, np.uint8(252))
    if flaw is Flaw.TOO_SMALL:
        image = cv2.resize(image, (SMALL_PX, SMALL_PX), interpolation=cv2.INTER_AREA).astype(np.uint8)
    data = _jpeg(image)
    if flaw is Flaw.CORRUPT_JPEG:
        data = data[: len(data) // 3]
    return WebImage(data, scene.caption, flaw, scene if flaw is None else None)


def _duplicate(original: WebImage, row: int, flaw: Flaw, rng: np.random.Generator) -> WebImage:
    """The same bytes, or the same picture a little smaller, brighter and encoded worse."""
    assert original.scene is not None
    if flaw is Flaw.EXACT_DUPLICATE:
        return WebImage(original.jpeg, original.alt_text, flaw, None, row)
    image = original.scene.image
    height, width = image.shape[:2]
    smaller = cv2.resize(image, (round(width * 0.92), round(height * 0.92)), interpolation=cv2.INTER_AREA)
    brighter = np.clip(smaller.astype(np.float32) * rng.uniform(1.01, 1.04), 0, 255).astype(np.uint8)
    return WebImage(_jpeg(brighter, quality=80), original.alt_text, flaw, None, row)


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """(height, width) with an aspect between 2:3 and 3:2."""
    longer = int(rng.integers(SIZES_PX[0] + 32, SIZES_PX[1] + 1))
    shorter = max(SIZES_PX[0], round(longer * rng.uniform(0.67, 1.0)))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)


def _jpeg(image: NDArray[np.uint8], quality: int = 92) -> bytes:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return bytes(data)
