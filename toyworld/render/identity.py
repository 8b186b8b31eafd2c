"""Who a subject is: a noun, and looks that words cannot fully tell."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Literal

import numpy as np

from toyworld.render.canvas import RGB, Pattern

Split = Literal["train", "heldout"]

COLORS: dict[str, RGB] = {
    "red": (215, 50, 45),
    "orange": (240, 140, 40),
    "yellow": (242, 210, 60),
    "green": (70, 165, 75),
    "teal": (40, 160, 160),
    "blue": (55, 105, 205),
    "purple": (135, 75, 180),
    "pink": (238, 130, 175),
    "brown": (140, 92, 58),
    "gray": (140, 142, 150),
}
"""The main colors that captions can name."""

_PATTERNS: tuple[Pattern, ...] = ("plain", "plain", "striped", "dotted", "checkered")


@dataclass(frozen=True)
class Look:
    """Colors as drawn, and four shape parameters in 0..1."""

    main: RGB
    second: RGB
    pattern: Pattern
    pattern_rgb: RGB
    pattern_step: float
    shape: tuple[float, float, float, float]


@dataclass(frozen=True)
class Identity:
    """One individual. `color`: the word for its main color."""

    noun: str
    index: int
    color: str
    look: Look


def sample_identity(noun: str, index: int, split: Split) -> Identity:
    """The identity number `index` of a noun; the two splits share none, for their streams differ."""
    seed = np.random.SeedSequence([0x1DE, sum(noun.encode()) * 1000 + len(noun), split == "heldout", index])
    rng = np.random.default_rng(seed)
    names = list(COLORS)
    first, other = rng.choice(len(names), 2, replace=False)
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))]
    main = _jitter(COLORS[names[first]], rng)
    second = _jitter(COLORS[names[other]], rng)
    pattern_rgb = (245, 240, 228) if rng.random() < 0.5 else second
    shape = rng.random(4)
    look = Look(
        main,
        second,
        pattern,
        pattern_rgb,
        float(rng.uniform(0.22, 0.42)),
        (float(shape[0]), float(shape[1]), float(shape[2]), float(shape[3])),
    )
    return Identity(noun, index, names[first], look)


def _jitter(color: RGB, rng: np.random.Generator) -> RGB:
    """Another shade that still goes by the same word."""
    h, lightness, s = colorsys.rgb_to_hls(*(c / 255 for c in color))
    h, lightness, s = h + rng.normal(0, 0.008), lightness * rng.uniform(0.88, 1.1), s * rng.uniform(0.85, 1.1)
    r, g, b = colorsys.hls_to_rgb(h % 1, min(lightness, 0.85), min(s, 1))
    return (round(r * 255), round(g * 255), round(b * 255))
