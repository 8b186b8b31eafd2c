"""The vision tower that the captioner begins from: a small ViT that has learned which noun each patch shows.

Captions say little about where a noun is, so a ViT learns recognition from them slowly. The masks of rendered scenes
say it patch by patch: a linear head on the patch tokens (thrown away afterwards) makes the same ViT recognize within
minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BlipVisionConfig, BlipVisionModel

from toyworld.pretrain.loop import LoopSettings, fast_precision, train
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


@dataclass(frozen=True)
class SceneBatch:
    """pixels: (B, 3, SIZE, SIZE) float32. masks: (B, N, SIZE, SIZE) float32 in {0, 1}, disjoint. nouns: (B, N) int64,

    index into NOUNS of each mask's subject, -1 where an image has fewer. rows: (B,) int64, which scenes these are.
    """

    pixels: Tensor
    masks: Tensor
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
        pixels = nn.functional.avg_pool2d(view_pixels(scenes.images[rows], finer, MEAN, STD, rng), 2)
        masks = view_labels(scenes.masks(rows), grid)
        return SceneBatch(pixels, masks, torch.from_numpy(scenes.nouns[rows].astype(np.int64)), rows)

    return batch_at


class DenseTower(nn.Module):
    """A BLIP ViT with two heads: one for patches and subjects, one for what the class token says of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.vision: nn.Module = BlipVisionModel(BlipVisionConfig(**vision_settings()))
        self.patch_head = nn.Linear(HIDDEN, len(NOUNS) + 1)
        self.image_head = nn.Linear(HIDDEN, len(NOUNS))

    def forward(self, batch: SceneBatch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = self.vision(pixel_values=batch.pixels).last_hidden_state
        return dense_loss(tokens.float(), self.patch_head, self.image_head, batch)


def dense_loss(
    tokens: Tensor, patch_head: nn.Module, image_head: nn.Module, batch: SceneBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the ViT's tokens (B, 1 + P, D) say of an image, three times over, as one loss.

    Cross-entropy of the noun under each patch's center (index 0 is background, at weight 0.3); cross-entropy of each
    subject's noun from the mean of its patches, weighted by the mask's share of them, with the same head; binary
    cross-entropy of the image's set of nouns from the class token.
    """
    side = round((tokens.shape[1] - 1) ** 0.5)
    patch = batch.masks.shape[-1] // side
    shown = batch.nouns >= 0
    map_of_ids = (batch.masks * (batch.nouns + 1).clamp(min=0)[:, :, None, None]).amax(dim=1).long()
    target = map_of_ids[:, patch // 2 :: patch, patch // 2 :: patch].flatten(1)
    logits = patch_head(tokens[:, 1:]).float()
    weight = torch.ones(logits.shape[-1])
    weight[0] = 0.3
    by_patch = nn.functional.cross_entropy(logits.transpose(1, 2), target, weight=weight)

    share = nn.functional.avg_pool2d(batch.masks, patch).flatten(2)
    share = share / share.sum(dim=2, keepdim=True).clamp(min=1e-6)
    subjects = patch_head(share @ tokens[:, 1:])[shown].float()
    by_subject = nn.functional.cross_entropy(subjects, batch.nouns[shown] + 1)

    named = image_head(tokens[:, 0]).float()
    present = torch.zeros_like(named)
    rows, columns = shown.nonzero(as_tuple=True)
    present[rows, batch.nouns[rows, columns]] = 1
    by_image = nn.functional.binary_cross_entropy_with_logits(named, present)
    right = (subjects.argmax(dim=1) == batch.nouns[shown] + 1).float().mean()
    exact = ((named > 0).float() == present).all(dim=1).float().mean()
    return by_patch + by_subject + 4 * by_image, {"subjects": right, "sets": exact}


def warm_tower(scenes: SceneSet, steps: int, seed: int, folder: Path) -> DenseTower:
    """The tower after `steps` steps of the dense loss alone; a finished checkpoint in `folder` is taken as it is."""
    torch.manual_seed(seed)
    tower = DenseTower()

    def loss(model: nn.Module, batch: SceneBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with fast_precision():
            value: tuple[Tensor, dict[str, Tensor]] = model(batch)
        return value

    settings = LoopSettings(steps=steps, lr=1.5e-3, seed=seed)
    averaged = train(tower, batches(scenes, seed, images=32), loss, settings, folder)
    assert isinstance(averaged, DenseTower)
    return averaged.requires_grad_(True)
