"""Trains a linear model with the shared loop, for a test that starts it under torchrun: python -m … FOLDER IMAGES"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from toyworld.pretrain.loop import LoopSettings, train

STEPS = 20


def rows(step: int, images: int) -> Tensor:
    """(images, 4): batches follow each other in one long table."""
    table = np.random.default_rng(0).standard_normal((STEPS * 8, 4), dtype=np.float32)
    return torch.from_numpy(table[step * images :][:images])


def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (model(batch) - batch.prod(1, keepdim=True)).square().mean(), {}


def main(folder: Path, images: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    train(model, lambda step: rows(step, images), loss, LoopSettings(STEPS, lr=1e-2, warmup=5), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
