"""The vision tower that the captioner and CLIP begin from: a small ViT that has learnt which noun each patch shows.

Captions say little about where a noun is, so a ViT learns recognition from them slowly. The masks of rendered scenes
say it patch by patch: a linear head on the patch tokens (thrown away afterwards) makes the same ViT recognise within
minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipVisionConfig, BlipVisionModel

from toyworld.pretrain.loop import LoopSettings, train
from toyworld.pretrain.scenes import SceneSet
from toyworld.pretrain.views import random_windows, sampling_grid, view_labels, view_pixels
from toyworld.render import NOUNS

SIZE = 96  # side of the square that the tower sees, pixels: 144 patches, half the cost of 128
PATCH = 8
HIDDEN = 128
LAYERS = 5
HEADS = 4
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's, used by BLIP too


def vision_settings() -> dict[str, int | float | str]:
    """Sizes shared by BLIP's and CLIP's vision configs, so that weights of one can begin the other."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
    }


class DenseTower(nn.Module):
    """A BLIP ViT with two heads: the noun under each patch's centre, and from the class token the image's nouns."""

    def __init__(self) -> None:
        super().__init__()
        self.vision: nn.Module = BlipVisionModel(BlipVisionConfig(**vision_settings()))
        self.patch_head = nn.Linear(HIDDEN, len(NOUNS) + 1)
        self.image_head = nn.Linear(HIDDEN, len(NOUNS))

    def forward(self, pixels: Tensor, nouns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """pixels: (B, 3, SIZE, SIZE); nouns: (B, SIZE, SIZE) int64, 0 = background, noun id + 1 elsewhere."""
        tokens = self.vision(pixel_values=pixels).last_hidden_state
        return dense_loss(self.patch_head(tokens[:, 1:]), self.image_head(tokens[:, 0]), nouns)


def dense_loss(patch_logits: Tensor, image_logits: Tensor, nouns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each patch's noun (background at 0.3) plus binary cross-entropy of the image's set of nouns.

    patch_logits: (B, P, nouns + 1); image_logits: (B, nouns); nouns: (B, H, W) int64, 0 = background.
    """
    classes = patch_logits.shape[-1]
    side = nouns.shape[-1] // round(patch_logits.shape[1] ** 0.5)
    target = nouns[:, side // 2 :: side, side // 2 :: side].flatten(1)
    logits = patch_logits.float()
    weight = torch.ones(classes)
    weight[0] = 0.3
    patch = F.cross_entropy(logits.transpose(1, 2), target, weight=weight)
    present = F.one_hot(target, classes).amax(dim=1)[:, 1:].float()
    image = F.binary_cross_entropy_with_logits(image_logits.float(), present)
    shown = target > 0
    right = ((logits.argmax(dim=-1) == target) & shown).sum() / shown.sum().clamp(min=1)
    return patch + 2 * image, {"patch_accuracy": right}


@dataclass(frozen=True)
class SceneBatch:
    """pixels: (B, 3, SIZE, SIZE) float32. nouns: (B, SIZE, SIZE) int64, 0 = background, noun id + 1 elsewhere.

    rows: (B,) int64, which scenes these are.
    """

    pixels: Tensor
    nouns: Tensor
    rows: np.ndarray[tuple[int], np.dtype[np.int64]]


def batches(scenes: SceneSet, seed: int, images: int) -> Callable[[int], SceneBatch]:
    """Step -> batch. Each image is a window that holds all subjects, stretched to the square as BLIP's processor does.

    images: how many are in a batch.
    """

    def batch_at(step: int) -> SceneBatch:
        rng = np.random.default_rng((seed, step))
        rows = np.sort(rng.choice(len(scenes), images, replace=False))
        drawn = scenes.images.shape[1]
        windows = torch.from_numpy(random_windows(scenes.boxes[rows], drawn, rng, keep=True))
        grid = sampling_grid(windows, drawn, SIZE, stretch=True)
        finer = sampling_grid(windows, drawn, 2 * SIZE, stretch=True)  # averaged after, for want of antialiasing
        pixels = F.avg_pool2d(view_pixels(scenes.images[rows], finer, MEAN, STD, rng), 2)
        ids = (scenes.nouns[rows] + 1).astype(np.uint8)[:, :, None, None]  # masks are disjoint: the maximum is the noun
        labels = view_labels((scenes.masks(rows) * ids).max(axis=1, keepdims=True), grid)
        return SceneBatch(pixels, labels[:, 0].long(), rows)

    return batch_at


def warm_tower(scenes: SceneSet, steps: int, seed: int, folder: Path) -> DenseTower:
    """The tower after `steps` steps of the dense loss alone; a finished checkpoint in `folder` is taken as it is."""
    torch.manual_seed(seed)
    tower = DenseTower()

    def loss(model: nn.Module, batch: SceneBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            value: tuple[Tensor, dict[str, Tensor]] = model(batch.pixels, batch.nouns)
        return value

    settings = LoopSettings(steps=steps, lr=1e-3, seed=seed)
    averaged = train(tower, batches(scenes, seed, images=32), loss, settings, folder)
    assert isinstance(averaged, DenseTower)
    return averaged.requires_grad_(True)
