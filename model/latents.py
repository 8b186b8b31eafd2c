"""Where a sampling begins and ends: noise or a noised image, and latents back to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from model.errors import ModelError


def initial_noise(
    latents: Tensor | None,
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(N, C, h, w) of unit variance: `latents` where they are given, in place of drawn ones. Raises ModelError."""
    if latents is None:
        drawn: Tensor = randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
        return drawn
    if tuple(latents.shape) != tuple(shape):
        raise ModelError(f"latents are of shape {tuple(latents.shape)}; these images need {tuple(shape)}")
    return latents.to(device, dtype)


def noised(vae: AutoencoderKL, scheduler: Any, pixels: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """The image with noise up to `timestep`, from which its editing starts (SDEdit, arXiv 2108.01073). pixels:
    (1, 3, H, W) in -1..1; noise: (N, C, h, w); timestep: (1,). Returns (N, C, h, w)."""
    encoded = _in_range(vae, lambda: vae.encode(pixels.to(vae.dtype)).latent_dist.mode()) * vae.config.scaling_factor
    started: Tensor = scheduler.add_noise(encoded.to(noise.dtype).expand_as(noise), noise, timestep)
    return started


def last_steps(scheduler: Any, strength: float, num_inference_steps: int) -> Tensor:
    """The timesteps that remain after an image is noised by a share of `strength`, 0..1, of them; at least one."""
    first = num_inference_steps - max(1, min(int(num_inference_steps * strength), num_inference_steps))
    first *= scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    steps: Tensor = scheduler.timesteps[first:]
    return steps


@torch.no_grad()
def posterior(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """images: (B, 3, H, W) uint8 RGB. Returns mean and standard deviation of the latents that the VAE takes them for,
    (B, 2, C, h, w)."""

    def compute() -> Tensor:
        found = vae.encode(images.to(vae.dtype) / 127.5 - 1).latent_dist
        return torch.stack([found.mean, found.std], dim=1)

    return _in_range(vae, compute)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, 3, H, W) in about -1..1, in the VAE's dtype; float32 where float16 cannot hold it."""
    scaled = latents / vae.config.scaling_factor
    return _in_range(vae, lambda: vae.decode(scaled.to(vae.dtype), return_dict=False)[0])


def _in_range(vae: AutoencoderKL, compute: Callable[[], Tensor]) -> Tensor:
    """Activations of some VAEs, as Stable Diffusion XL's, leave float16's range, and the image would be black: there it
    is computed again in float32."""
    with torch.autocast(vae.device.type, enabled=False):  # a VAE is in float32 beside narrower parts for a reason
        found = compute()
        if vae.dtype == torch.float16 and not found.isfinite().all():
            vae.to(torch.float32)
            found = compute()
            vae.to(torch.float16)
    return found
