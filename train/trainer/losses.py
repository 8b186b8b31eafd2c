"""What training minimizes: a weighted sum of losses, each a pure function that gives one value per image.

A new loss is a function with its formula here and a line in `LOSSES`; the total, the log and TensorBoard follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Losses, SubjectDiffusion, TrainingBatch, min_snr_weight
from train.trainer.recipe import TrainRecipe


@dataclass(frozen=True)
class ForwardPass:
    """What a loss may look at: a batch, and what the model made of it."""

    recipe: TrainRecipe
    model: SubjectDiffusion
    batch: TrainingBatch
    found: Losses


def diffusion(done: ForwardPass) -> Tensor:
    """‖ε − ε̂‖², mean over the latent (DDPM, eq. 14), or the same of v. Returns (B,)."""
    return done.found.diffusion


def diffusion_weight(done: ForwardPass) -> float | Tensor:
    """min(SNR, γ) / SNR for each image (Min-SNR, section 3.4), (B,); 1 where optimizer.min_snr is 0."""
    gamma = done.recipe.optimizer.min_snr
    if not gamma:
        return 1.0
    return min_snr_weight(done.model.signal_to_noise(done.batch.timesteps), gamma, done.model.prediction_type)


def attention(done: ForwardPass) -> Tensor:
    """`model.attention_control.attention_loss`, where its formulas are. Returns (B,)."""
    return done.found.attention


def attention_weight(done: ForwardPass) -> float | Tensor:
    """λ of the paper: model.attention_weight."""
    return done.recipe.model.attention_weight


@dataclass(frozen=True)
class Loss:
    """A loss and its weight in the total, which is one number, or one per image, (B,)."""

    value: Callable[[ForwardPass], Tensor]
    weight: Callable[[ForwardPass], float | Tensor]


LOSSES: dict[str, Loss] = {
    "diffusion": Loss(diffusion, diffusion_weight),
    "attention": Loss(attention, attention_weight),
}
"""By the name under which the log shows a loss, unweighted."""


def total_and_losses(done: ForwardPass) -> tuple[Tensor, Tensor]:
    """The weighted sum, a scalar; and the unweighted mean of each of `LOSSES` over the images, (L,), detached."""
    values = [loss.value(done) for loss in LOSSES.values()]
    weighted = [_mean(value, loss.weight(done)) for value, loss in zip(values, LOSSES.values(), strict=True)]
    return torch.stack(weighted).sum(), torch.stack([value.mean() for value in values]).detach()


def _mean(value: Tensor, weight: float | Tensor) -> Tensor:
    return (value * weight).mean() if isinstance(weight, Tensor) else weight * value.mean()
