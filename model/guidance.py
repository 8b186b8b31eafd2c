"""Three-branch guidance: text and subjects each have a scale of their own; a rescaling keeps the contrast in bounds."""

from __future__ import annotations

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor


def guide(full: Tensor, image: Tensor, nothing: Tensor, text_scale: float, subject_scale: float) -> Tensor:
    """ε = ε_u + s_t·(ε_full − ε_img) + s_i·(ε_img − ε_u) (Subject-Diffusion, inference).

    full: predicted with text, location and subject tokens; image: without the text; nothing: with none of them; all of
    one shape, ε or v alike.
    """
    return nothing + text_scale * (full - image) + subject_scale * (image - nothing)


def hold_contrast(guided: Tensor, full: Tensor, share: float) -> Tensor:
    """Rescales `guided` toward the standard deviation of `full`, by `share`, 0..1 (Lin et al. 2024,
    arXiv 2305.08891, section 3.4). Where a schedule ends in pure noise, guidance makes colors glare without it."""
    held: Tensor = rescale_noise_cfg(guided, full, guidance_rescale=share) if share else guided
    return held
