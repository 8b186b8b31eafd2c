"""Look-alikes drawn alone, from several views: what the encoder of identities learns from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import cv2
import numpy as np
from numpy.typing import NDArray

from toyworld.render import NOUNS, sample_identity
from toyworld.render.drawings import draw
from toyworld.render.identity import Split
from toyworld.render.look_alikes import look_alikes

MAX_TILT_DEG = 15.0
"""As in scenes."""


@dataclass(frozen=True)
class Cutouts:
    """G groups of look-alikes, N individuals each, seen from V views.

    rgb: (G, N, V, S, S, 3) uint8. alpha: (G, N, V, S, S) uint8. The subject's longer side fills the square.
    """

    rgb: NDArray[np.uint8]
    alpha: NDArray[np.uint8]


def draw_cutouts(split: Split, groups_of_noun: int, individuals: int, views: int, size: int, processes: int) -> Cutouts:
    """The first groups of every noun, in squares of `size` pixels."""
    groups = [
        (noun, group)
        for noun in NOUNS
        for group, _ in zip(look_alikes(noun, split, individuals), range(groups_of_noun), strict=False)
    ]
    with get_context("spawn").Pool(processes) as pool:
        drawn = list(pool.imap(partial(_draw_group, split=split, views=views, size=size), groups, chunksize=4))
    return Cutouts(*(np.stack(parts) for parts in zip(*drawn, strict=True)))


def _draw_group(
    group: tuple[str, tuple[int, ...]], split: Split, views: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    noun, indices = group
    rgb = np.zeros((len(indices), views, size, size, 3), np.uint8)
    alpha = np.zeros((len(indices), views, size, size), np.uint8)
    for i, index in enumerate(indices):
        rng = np.random.default_rng((index, views))
        for view in range(views):
            tilt = float(rng.uniform(-MAX_TILT_DEG, MAX_TILT_DEG))
            colors, opacity = draw(sample_identity(noun, index, split), tilt, bool(rng.random() < 0.5))
            scale = size / max(opacity.shape)
            w, h = (max(1, round(side * scale)) for side in opacity.shape[::-1])
            x, y = (size - w) // 2, (size - h) // 2
            rgb[i, view, y : y + h, x : x + w] = cv2.resize(colors, (w, h), interpolation=cv2.INTER_AREA)
            alpha[i, view, y : y + h, x : x + w] = cv2.resize(opacity, (w, h), interpolation=cv2.INTER_AREA)
    return rgb, alpha
