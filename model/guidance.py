"""Three-branch guidance: text and subjects are each pushed by their own scale, and contrast is held in bounds."""

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
    """`guided` moved by `share`, 0..1, toward itself with the standard deviation that `full` has (Lin et al. 2024,
    arXiv 2305.08891, section 3.4). Where a schedule ends in pure noise, guidance makes colors glare without it."""
    held: Tensor = rescale_noise_cfg(guided, full, guidance_rescale=share) if share else guided
    return held
