"""How different two images are to a network that recognizes the toy world's nouns: the captioner's vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration

from toyworld.pretrain.card import WEIGHTS
from toyworld.pretrain.tower import MEAN, SIZE, STD

LAYERS = 4  # of the tower's five: the last one's tokens say only which noun it is


class Perception(nn.Module):
    """Distance of images by the first layers of BLIP's ViT, frozen, as LPIPS (Zhang et al. 2018) has it by VGG's.

    Neither CLIP nor Grounding DINO, which the autoencoder's and the UNet's scores come from.
    """

    def __init__(self, folder: Path = WEIGHTS / "blip") -> None:
        super().__init__()
        model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.tower: Any = model.vision_model.eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Mean squared difference of normalized patch tokens; (B, 3, H, W) in -1..1 each, gradients to `one` alone."""
        with torch.no_grad():
            target = self.tokens(other)
        pairs = zip(self.tokens(one), target, strict=True)
        return torch.stack([(mine - its).square().mean() for mine, its in pairs]).mean()

    def tokens(self, images: Tensor) -> list[Tensor]:
        """Patch tokens (B, P, D) after each of the first `LAYERS` layers, each of mean 0 and variance 1."""
        # On CPUs bfloat16 has no such interpolation.
        seen = nn.functional.interpolate((images.float() + 1) / 2, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        states, found = self.tower.embeddings((seen - self.mean) / self.std), []
        for layer in self.tower.encoder.layers[:LAYERS]:
            states = layer(states)
            found.append(nn.functional.layer_norm(states[:, 1:].float(), states.shape[-1:]))
        return found
