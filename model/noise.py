"""Noise in diffusion training: how much there is at each timestep, and what the UNet should predict."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
"""What a base's UNet predicts."""


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """z_t = √ᾱ·z + √(1 − ᾱ)·ε (DDPM, eq. 4). latents, noise: (B, C, h, w); alphas_cumprod: ᾱ of each, (B,)."""
    alpha = alphas_cumprod[:, None, None, None]
    return (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(latents.dtype)


def target(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction: Prediction) -> Tensor:
    """What the UNet should predict: ε, or v = √ᾱ·ε − √(1 − ᾱ)·z (Progressive Distillation, appendix D)."""
    if prediction == "epsilon":
        return noise
    alpha = alphas_cumprod[:, None, None, None]
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """SNR = ᾱ / (1 − ᾱ) (Min-SNR, eq. 4)."""
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """min(SNR, γ) / SNR, for ε; min(SNR, γ) / (SNR + 1), for v (Min-SNR, section 3.4). snr: (B,)."""
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # also where the schedule ends in pure noise, SNR 0
    return snr.clamp(max=gamma) / (snr + 1)
