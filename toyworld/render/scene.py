"""A scene: one to four subjects on a textured background, with everything about them known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from toyworld.render.captions import describe
from toyworld.render.drawings import NOUNS, draw
from toyworld.render.identity import Identity, Split, sample_identity
from toyworld.render.textures import BACKGROUNDS, texture

Box = tuple[float, float, float, float]
IDENTITIES_PER_NOUN = 4000
MIN_VISIBLE = 0.6
MIN_AREA = 0.085
"""Area of a visible box as a share of the image: above the 0.08 below which the paper drops an entity."""

_AREAS = {1: (0.16, 0.45), 2: (0.12, 0.28), 3: (0.1, 0.19), 4: (0.1, 0.15)}
"""Share of the image that a subject's box aims at, by the number of subjects."""

_MAX_TILT_DEG = 15.0


@dataclass(frozen=True)
class PlacedSubject:
    """`box`: (x1, y1, x2, y2) pixels, tight around `mask`, (H, W) bool, its visible pixels. Spans: [start, end) of
    the caption."""

    identity: Identity
    box: Box
    mask: NDArray[np.bool_]
    phrase: str
    phrase_span: tuple[int, int]
    span: tuple[int, int]

    @property
    def tag(self) -> str:
        return self.identity.noun


@dataclass(frozen=True)
class Scene:
    """`image`: (H, W, 3) uint8 RGB."""

    image: NDArray[np.uint8]
    caption: str
    subjects: tuple[PlacedSubject, ...]
    background: str


def render_scene(
    seed: int,
    *,
    size: int | tuple[int, int] = 192,
    split: Split = "train",
    subjects: int | None = None,
    identities: Sequence[Identity] | None = None,
    pool: range = range(IDENTITIES_PER_NOUN),
) -> Scene:
    """The scene of a seed. `size`: pixels, a side or (height, width). `identities`: draw these instead of sampled
    ones. `pool`: the individuals of each noun to sample from."""
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(np.random.SeedSequence([0x5CE, split == "heldout", seed]))
    count = subjects or int(rng.choice([1, 2, 3, 4], p=[0.15, 0.4, 0.3, 0.15]))
    chosen = list(identities) if identities is not None else _sample_identities(count, split, pool, rng)
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    while True:
        placed = _place(chosen, height, width, rng)
        if placed is not None:
            break
    image, masks = _compose(texture(background, height, width, rng), placed)
    boxes = [_box_of(mask) for mask in masks]
    caption, mentions = describe(chosen, boxes, background, rng)
    by_subject = {i: mention for mention in mentions for i in mention.subjects}
    return Scene(
        image,
        caption,
        tuple(
            PlacedSubject(
                identity,
                boxes[i],
                masks[i],
                caption[slice(*by_subject[i].phrase_span)],
                by_subject[i].phrase_span,
                by_subject[i].noun_span,
            )
            for i, identity in enumerate(chosen)
        ),
        background,
    )


def _sample_identities(count: int, split: Split, pool: range, rng: np.random.Generator) -> list[Identity]:
    repeated = 2 + int(rng.random() < 0.3) if count >= 2 and rng.random() < 0.12 else 1
    different = max(1, count - repeated + 1)
    nouns = [NOUNS[i] for i in rng.choice(len(NOUNS), different, replace=False)]
    nouns += [nouns[0]] * (count - different)
    return [sample_identity(noun, pool[rng.integers(len(pool))], split) for noun in nouns]


@dataclass(frozen=True)
class _Sprite:
    rgb: NDArray[np.uint8]
    alpha: NDArray[np.uint8]
    x: int
    y: int


def _place(identities: Sequence[Identity], height: int, width: int, rng: np.random.Generator) -> list[_Sprite] | None:
    """Sprites back to front, or None when some subject would be hidden too much or cut too small."""
    cover = np.full((height, width), -1, np.int8)
    sprites: list[_Sprite] = []
    for i, identity in enumerate(identities):
        rgb, alpha = _drawn(identity, _AREAS[min(len(identities), 4)], height, width, rng)
        place = _free_place(cover, alpha.shape, rng)
        if place is None:
            return None
        sprites.append(_Sprite(rgb, alpha, *place))
        _window(cover, sprites[-1])[alpha > 127] = i
    return sprites if all(_is_seen(cover == i, sprite) for i, sprite in enumerate(sprites)) else None


def _drawn(
    identity: Identity, areas: tuple[float, float], height: int, width: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """RGB (h, w, 3) and alpha (h, w) of a subject that takes a share within `areas` of the image."""
    low, high = areas
    rgb, alpha = draw(identity, float(rng.uniform(-_MAX_TILT_DEG, _MAX_TILT_DEG)), bool(rng.random() < 0.5))
    scale = float(np.sqrt(rng.uniform(low, high) * height * width / alpha.size))
    scale = min(scale, 0.96 * height / alpha.shape[0], 0.96 * width / alpha.shape[1])
    size = max(8, round(alpha.shape[1] * scale)), max(8, round(alpha.shape[0] * scale))
    resized = (cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in (rgb, alpha))
    return next(resized), next(resized)


def _free_place(cover: NDArray[np.int8], size: tuple[int, ...], rng: np.random.Generator) -> tuple[int, int] | None:
    """(x, y) for a sprite of (height, width) `size`, the least crowded of a few, or None where all are full."""
    (height, width), (h, w) = cover.shape, size
    best: tuple[int, int] | None = None
    least = 1.0
    for _ in range(8):
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        crowded = float((cover[y : y + h, x : x + w] >= 0).mean())
        if crowded < least:
            best, least = (x, y), crowded
        if crowded < rng.uniform(0.0, 0.25):
            break
    return best


def _is_seen(mask: NDArray[np.bool_], sprite: _Sprite) -> bool:
    """Whether enough of a sprite is in its visible mask, and that has a box worth labeling."""
    if int(mask.sum()) < MIN_VISIBLE * int((sprite.alpha > 127).sum()):
        return False
    height, width = mask.shape
    x1, y1, x2, y2 = _box_of(mask)
    return (x2 - x1) * (y2 - y1) >= MIN_AREA * height * width and 0.35 < (x2 - x1) / (y2 - y1) < 2.8


def _compose(image: NDArray[np.uint8], sprites: Sequence[_Sprite]) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]]]:
    """The image, and the visible mask of each sprite."""
    canvas = image.astype(np.float32)
    cover = np.full(image.shape[:2], -1, np.int8)
    for i, sprite in enumerate(sprites):
        alpha = (sprite.alpha.astype(np.float32) / 255)[..., None]
        under = _window(canvas, sprite)
        under += (sprite.rgb - under) * alpha
        _window(cover, sprite)[sprite.alpha > 127] = i
    return canvas.astype(np.uint8), [cover == i for i in range(len(sprites))]


def _window(image: NDArray[Any], sprite: _Sprite) -> NDArray[Any]:
    """The part of an image, as a view, that lies under a sprite."""
    h, w = sprite.alpha.shape
    return image[sprite.y : sprite.y + h, sprite.x : sprite.x + w]


def _box_of(mask: NDArray[np.bool_]) -> Box:
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    return float(x), float(y), float(x + w), float(y + h)
