"""Look-alikes cut out of scenes as `sdd pairs` cuts them out: what the encoder of identities learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from datapipe.backends.loading import ModelSettings
from datapipe.backends.patch_features import cut_out
from datapipe.backends.protocol import Box, Pixels
from datapipe.backends.sam import TransformersSam
from toyworld.pretrain.card import WEIGHTS
from toyworld.pretrain.redraw import redraw
from toyworld.render import NOUNS, render_scene, sample_identity
from toyworld.render.identity import Identity, Split
from toyworld.render.look_alikes import look_alikes

BY_SAM = 0.4
"""Share of scenes whose masks are SAM's; the others' are the true ones, up to `MOST_OFF_PX` larger or smaller."""
MOST_OFF_PX = 2
MOST_OFF_BOX = 0.04
"""By which share of a box's side SAM's prompt is off, at most."""
SIZES_PX = (160, 256)
"""Of the scenes, as in benchmarks/pairs.py."""
REDRAWN_FROM = (0.1, 0.6)
"""How much of the noise schedule a redrawn scene goes through; with more, no individual is left to tell."""
_SUBJECTS = ((1, 2, 3, 4), (0.15, 0.4, 0.3, 0.15))
_SCENES_AT_ONCE = 32

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Cutouts:
    """G groups of look-alikes, N individuals each, seen in V scenes.

    rgb: (G, N, V, S, S, 3) uint8. covered: (G, N, V, S, S) uint8, how far the mask covers each pixel, in 1/255.
    """

    rgb: NDArray[np.uint8]
    covered: NDArray[np.uint8]


def draw_cutouts(
    split: Split,
    groups_of_noun: int,
    individuals: int,
    views: int,
    side: int,
    background: Sequence[float],
    redrawn: float = 0.0,
) -> Cutouts:
    """The first groups of every noun, in squares of `side` pixels; background: RGB in 0..255; redrawn: share of scenes
    that the toy Stable Diffusion redraws, as roughly as it draws all else. Two processes draw, where it is worth
    it."""
    groups = [
        [sample_identity(noun, index, split) for index in group]
        for noun in NOUNS
        for group in islice(look_alikes(noun, split, individuals), groups_of_noun)
    ]
    shown = [(identity, view) for group in groups for identity in group for view in range(views)]
    order = np.random.default_rng(len(shown)).permutation(len(shown))
    scenes = _shared_out(order)
    parts = [
        range(first, min(first + _SCENES_AT_ONCE, len(scenes))) for first in range(0, len(scenes), _SCENES_AT_ONCE)
    ]
    jobs = [[(seed, [shown[i][0] for i in scenes[seed]]) for seed in part] for part in parts]
    rgb = np.zeros((len(shown), side, side, 3), np.uint8)
    covered = np.zeros((len(shown), side, side), np.uint8)
    draw = partial(_cut_outs, split=split, side=side, background=background, redrawn=redrawn)
    with ThreadPool(1) if len(jobs) == 1 else get_context("spawn").Pool(2) as pool:
        for part, found in zip(parts, pool.imap(draw, jobs), strict=True):
            here = np.concatenate([scenes[seed] for seed in part])
            rgb[here], covered[here] = found
    shape = (len(groups), individuals, views)
    return Cutouts(rgb.reshape(*shape, side, side, 3), covered.reshape(*shape, side, side))


def _shared_out(order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Who is in which scene: one to four in each, as often as in any scene of the toy world."""
    counts = np.random.default_rng(len(order)).choice(_SUBJECTS[0], len(order), p=_SUBJECTS[1])
    ends = np.cumsum(counts)
    return np.split(order, ends[ends < len(order)])


def _cut_outs(
    scenes: Sequence[tuple[int, Sequence[Identity]]],
    split: Split,
    side: int,
    background: Sequence[float],
    redrawn: float,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Of some scenes, each a seed and who is in it, all subjects one after another."""
    found = []
    for seed, identities in scenes:
        rng = np.random.default_rng((0xC07, seed))
        scene = render_scene(seed, size=int(rng.integers(*SIZES_PX)), split=split, identities=identities)
        image = _as_jpeg(scene.image)
        masks = [subject.mask for subject in scene.subjects]
        if rng.random() < BY_SAM:
            masks = _segmented(image, [s.box for s in scene.subjects], masks, rng)
        else:
            masks = [moved(mask, int(rng.integers(-MOST_OFF_PX, MOST_OFF_PX + 1))) for mask in masks]
        drawing = np.random.default_rng((0xD1F, seed))
        if drawing.random() < redrawn:
            image = redraw(image, scene.caption, float(drawing.uniform(*REDRAWN_FROM)), seed)
        found += [cut_out(image, mask, side, background) for mask in masks]
    return np.stack([rgb for rgb, _ in found]), np.stack([(c * 255).round().astype(np.uint8) for _, c in found])


def moved(mask: Mask, by_px: int) -> Mask:
    """Grown by so many pixels or, below 0, shrunk, unless nothing is left then. mask: (H, W)."""
    kernel = np.ones((2 * abs(by_px) + 1,) * 2, np.uint8)
    found: Mask = (cv2.dilate if by_px > 0 else cv2.erode)(mask.astype(np.uint8), kernel) > 0
    return found if found.any() else mask


def segmented(image: Pixels, boxes: Sequence[Box]) -> list[Mask]:
    """The toy world's SAM's masks of the boxes."""
    return [segment.mask.array() for segment in _sam()([image], [boxes])[0]]


def _segmented(image: Pixels, boxes: Sequence[Box], true: Sequence[Mask], rng: np.random.Generator) -> list[Mask]:
    """SAM's masks of boxes that are a little off; the true one where it finds nothing."""
    corners = np.array(boxes)
    sides = np.tile(corners[:, 2:] - corners[:, :2], 2)
    corners += rng.uniform(-MOST_OFF_BOX, MOST_OFF_BOX, corners.shape) * sides
    corners = corners.clip(0, np.tile(image.shape[1::-1], 2))
    found = segmented(image, [tuple(box) for box in corners.tolist()])
    return [mask if mask.any() else instead for mask, instead in zip(found, true, strict=True)]


@cache
def _sam() -> TransformersSam:
    torch.set_num_threads(1)
    return TransformersSam(ModelSettings(model=str(WEIGHTS / "sam")))


def _as_jpeg(image: Pixels) -> Pixels:
    """As the toy web serves it."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])
    return np.asarray(cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8)
