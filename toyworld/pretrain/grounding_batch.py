"""Batches for the grounding model: views of scenes, and prompts that name what is in them among some that is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertTokenizerFast

from toyworld.pretrain.scenes import MOST, SceneSet
from toyworld.pretrain.views import view_labels, view_pixels
from toyworld.render import NOUNS

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of the hub's image processor
SHAPES = ((128, 128), (128, 128), (128, 128), (128, 160), (160, 128), (128, 192), (192, 128))  # (H, W) of a batch
PADDING = (
    32  # the longer side is padded to a multiple of this, so that the detector knows padding (ground.pad_multiple)
)
CELL = 16  # side of the cells whose nouns are known, pixels
DECOYS = 4  # absent nouns in a prompt, at most


@dataclass(frozen=True)
class GroundingBatch:
    """B views of scenes with their prompts."""

    pixels: Tensor
    """(B, 3, H, W) float32, normalized, 0 where padded."""
    sizes: Tensor
    """(B, 2) float32: height and width of each view without its padding, pixels."""
    boxes: Tensor
    """(B, MOST, 4) float32, cxcywh in units of the view without padding; unused rows hold the whole view."""
    real: Tensor
    """(B, MOST) bool: which rows are used."""
    cells: Tensor
    """(B, H / 16, W / 16) int64: noun under each cell's center, 0 for none, else noun id + 1."""
    tokens: Tensor
    """(B, T) int64."""
    asked: Tensor
    """(B, T) bool: False where the prompt is padding."""
    phrases: Tensor
    """(B, MOST) int64: place of each object's noun in the prompt, 0 in unused rows."""


def batch_drawer(
    scenes: SceneSet, tokenizer: BertTokenizerFast, batch: int, seed: int
) -> Callable[[int], GroundingBatch]:
    """Step -> batch: `batch` scenes, a view of each, and a prompt of the nouns in it and some that are not."""
    prompts_of = _prompter(tokenizer)

    def draw(step: int) -> GroundingBatch:
        rng = np.random.default_rng((seed, step))
        rows = np.sort(rng.choice(len(scenes), batch, replace=False))
        shape = SHAPES[rng.integers(len(SHAPES))]
        side = scenes.images.shape[1]
        real = scenes.nouns[rows] >= 0
        sizes = np.array(shape) - rng.integers(0, PADDING, (batch, 2)) * (np.array(shape) > min(shape))
        drawn = draw_windows(scenes.boxes[rows], side, sizes, rng)
        windows, extents = torch.from_numpy(drawn), torch.from_numpy(sizes.astype(np.float32))
        grid = window_grid(windows, side, shape, extents)
        cell_grid = window_grid(windows, side, (shape[0] // CELL, shape[1] // CELL), extents, CELL)
        owner = np.where(scenes.masks(rows) > 0, scenes.nouns[rows].astype(np.uint8)[..., None, None] + 1, 0).max(1)
        cells = view_labels(owner[:, None].astype(np.uint8), cell_grid)[:, 0].long()
        tokens, phrases = prompts_of(scenes.nouns[rows], rng)
        return GroundingBatch(
            pixels=view_pixels(scenes.images[rows], grid, MEAN, STD, rng),
            sizes=extents,
            boxes=torch.from_numpy(boxes_in_windows(scenes.boxes[rows], drawn)),
            real=torch.from_numpy(real),
            cells=cells,
            tokens=torch.from_numpy(tokens),
            asked=torch.from_numpy(tokens != 0),
            phrases=torch.from_numpy(phrases),
        )

    return draw


Prompter = Callable[[NDArray[np.integer], np.random.Generator], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""The nouns of each scene, (B, MOST), below 0 in unused rows -> tokens and phrases of a `GroundingBatch`."""


def _prompter(tokenizer: BertTokenizerFast) -> Prompter:
    noun_tokens = np.array(tokenizer.convert_tokens_to_ids(list(NOUNS)))
    stop, start, end = tokenizer.convert_tokens_to_ids([".", "[CLS]", "[SEP]"])

    def prompts(scenes: NDArray[np.integer], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = np.zeros((len(scenes), 2 + 2 * (MOST + DECOYS)), dtype=np.int64)
        phrases = np.zeros((len(scenes), MOST), dtype=np.int64)
        for row, nouns in enumerate(scenes):
            shown = np.unique(nouns[nouns >= 0])
            absent = np.setdiff1d(np.arange(len(NOUNS)), shown)
            decoys = rng.choice(absent, rng.integers(DECOYS + 1), replace=False)
            order = rng.permutation(np.concatenate([shown, decoys]))
            words = np.stack([noun_tokens[order], np.full(len(order), stop)], axis=1).ravel()
            tokens[row, : len(words) + 2] = [start, *words, end]
            places = {int(noun): 1 + 2 * place for place, noun in enumerate(order)}
            phrases[row] = [places.get(int(noun), 0) for noun in nouns]
        return tokens[:, : (tokens != 0).sum(1).max()], phrases

    return prompts


def draw_windows(
    boxes: NDArray[np.float32], side: int, sizes: NDArray[np.integer], rng: np.random.Generator
) -> NDArray[np.float32]:
    """One window for each scene that cuts no subject; may reach beyond the scene; half of them are mirrored.

    boxes: (B, N, 4) xyxy in pixels of a scene of side `side`, NaN in unused rows; sizes: (B, 2) height and width that
    the windows are resized to, with subjects 0.8 to 1.3 times as large and up to 15 % stretched. Returns (B, 4) xyxy,
    x1 > x2 where mirrored.
    """
    count = len(boxes)
    low, high = np.nanmin(boxes[..., :2], axis=1) - 1, np.nanmax(boxes[..., 2:], axis=1) + 1
    zoom = np.exp(rng.uniform(np.log(0.8), np.log(1.3), (count, 1)))
    stretch = np.exp(rng.uniform(-0.15, 0.15, (count, 1)))
    extent = sizes[:, ::-1] * (side / 128) / np.concatenate([zoom * stretch, zoom / stretch], axis=1)
    plain = (rng.random((count, 1)) < 0.3) & (sizes[:, :1] == sizes[:, 1:])
    extent = np.where(plain, side, np.maximum(extent, high - low))
    first, last = np.minimum(low, high - extent), np.maximum(low, high - extent)
    inside = np.clip(rng.uniform(first, last), np.minimum(0, side - extent), np.maximum(0, side - extent))
    corner = np.where(plain, 0, np.clip(inside, first, last))
    windows = np.concatenate([corner, corner + extent], axis=1)
    mirrored = rng.random(count) < 0.5
    windows[mirrored] = windows[mirrored][:, [2, 1, 0, 3]]
    return windows.astype(np.float32)


def window_grid(windows: Tensor, side: int, shape: tuple[int, int], sizes: Tensor, step: int = 1) -> Tensor:
    """Where the pixels of padded views of `shape` (H, W) lie in a source of `side`; (B, H, W, 2) for grid_sample.

    windows: (B, 4) xyxy, pixels of the source; sizes: (B, 2) height and width of the views without padding; with `step`
    only every step-th pixel's place, beginning at step / 2. What is padding lies outside the source.
    """
    grid = []
    for axis, length in ((0, shape[1]), (1, shape[0])):
        unit = (torch.arange(length) + 0.5) * step / sizes[:, 1 - axis, None]
        place = windows[:, axis, None] + unit * (windows[:, 2 + axis] - windows[:, axis])[:, None]
        grid.append(torch.where(unit < 1, place * 2 / side - 1, 9.0))
    return torch.stack([grid[0][:, None].expand(-1, shape[0], -1), grid[1][:, :, None].expand(-1, -1, shape[1])], -1)


def boxes_in_windows(boxes: NDArray[np.float32], windows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, N, 4) xyxy in pixels and windows (B, 4) to (B, N, 4) cxcywh in units of the window; NaN rows to the whole."""
    corner, extent = windows[:, None, :2], windows[:, None, 2:] - windows[:, None, :2]
    one, other = (boxes[..., :2] - corner) / extent, (boxes[..., 2:] - corner) / extent
    low, high = np.clip(np.minimum(one, other), 0, 1), np.clip(np.maximum(one, other), 0, 1)
    inner = np.concatenate([(low + high) / 2, high - low], axis=-1)
    return np.where(np.isnan(inner), np.array([0.5, 0.5, 1, 1]), inner).astype(np.float32)
