"""Backgrounds: procedural textures that are never white."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grass": (96, 146, 72),
    "sand": (214, 188, 136),
    "brick": (164, 92, 74),
    "wood": (166, 122, 80),
    "snow": (196, 206, 220),
    "water": (84, 136, 176),
    "paper": (206, 198, 176),
    "tiles": (150, 166, 170),
    "carpet": (128, 84, 108),
    "sky": (140, 180, 214),
}
"""What captions call them, and their mean color."""

_BRIGHTEST = 222


def texture(name: str, height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB: a color with soft noise, the texture's own structure, and light from one side."""
    shade = np.zeros((height, width), np.float32)
    for cells, strength in ((5, 14.0), (17, 7.0)):
        coarse = rng.standard_normal((cells, cells)).astype(np.float32) * strength
        shade += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    shade += rng.standard_normal((height, width)).astype(np.float32) * 4
    shade += _structure(name, height, width, rng)
    light = np.linspace(-12, 12, width, dtype=np.float32) * rng.choice([-1, 1])
    color = np.array(BACKGROUNDS[name], np.float32) + rng.normal(0, 7, 3).astype(np.float32)
    return np.asarray(np.clip(color + (shade + light)[..., None], 8, _BRIGHTEST), np.uint8)


def _structure(name: str, height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x += np.float32(rng.uniform(0, 50))
    y += np.float32(rng.uniform(0, 50))
    unit = min(height, width) / np.float32(rng.uniform(5, 8))
    lines = np.zeros((height, width), np.float32)
    if name == "brick":
        row = np.floor(y / (unit * 0.6))
        lines = np.where(((y / (unit * 0.6)) % 1 < 0.12) | (((x / unit + 0.5 * (row % 2)) % 1) < 0.07), 42, 0)
    elif name == "tiles":
        lines = np.where(((y / unit) % 1 < 0.07) | ((x / unit) % 1 < 0.07), -38, 0)
    elif name == "wood":
        lines = 12 * np.sin(y / unit * 9 + 2 * np.sin(x / unit)) - np.where((y / unit) % 1 < 0.06, 40, 0)
    elif name == "water":
        lines = 13 * np.sin(y / unit * 6 + np.sin(x / unit * 2.4) * 1.5)
    elif name == "grass":
        lines = 15 * np.sin(x / unit * 13 + 3 * np.sin(y / unit * 2)) * np.sin(y / unit * 5)
    elif name == "carpet":
        lines = 12 * np.sign(np.sin(x / unit * 7) * np.sin(y / unit * 7))
    elif name == "sky":
        lines = (y / height - 0.5) * 40
    elif name == "sand":
        lines = 9 * np.sin(y / unit * 4 + 1.3 * np.sin(x / unit * 1.2))
    return np.asarray(lines, np.float32)
