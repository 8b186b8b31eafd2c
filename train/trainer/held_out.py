"""The diffusion loss on images that training does not see, by level of noise: where a run begins to overfit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from model import SubjectDiffusion
from train.trainer.encode import encode
from train.trainer.examples import ExampleBatch

LEVELS = (0.125, 0.375, 0.625, 0.875)
"""Timesteps as shares of the schedule: the middles of its quarters."""


@torch.no_grad()
def held_out_losses(model: SubjectDiffusion, batches: Iterable[ExampleBatch], device: torch.device) -> dict[str, float]:
    """The mean over the images, with every condition, at each of `LEVELS`; each image has the same noise at all of
    them. By the log's name, which has the timestep: held_out/loss_t125."""
    timesteps = [int(level * model.num_train_timesteps) for level in LEVELS]
    losses: list[Tensor] = []
    for batch in batches:
        encoded = encode(model, batch, device, offset_noise=0)
        by_level = []
        for timestep in timesteps:
            every = torch.full_like(encoded.timesteps, timestep)
            kept = torch.ones_like(encoded.condition_draw)
            by_level.append(model(dataclasses.replace(encoded, timesteps=every, condition_draw=kept)).diffusion)
        losses.append(torch.stack(by_level)[:, batch["valid"].to(device)])
    means = torch.cat(losses, dim=1).mean(dim=1).tolist()
    return {f"held_out/loss_t{timestep}": mean for timestep, mean in zip(timesteps, means, strict=True)}
