"""Three-branch guidance: text and subjects each have a scale of their own; a rescaling keeps the contrast in bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

Branch = Literal["full", "image", "nothing"]


def guide(full: Tensor, image: Tensor, nothing: Tensor, text_scale: float, subject_scale: Tensor) -> Tensor:
    """ε = ε_u + s_t·(ε_full − ε_img) + s_i·(ε_img − ε_u) (Subject-Diffusion, inference).

    full: (B, C, h, w), predicted with text, location and subject tokens; image: without the text; nothing: with none of
    them; all of one shape, ε or v alike. subject_scale: (B, 1, 1, 1).
    """
    return nothing + text_scale * (full - image) + subject_scale * (image - nothing)


def needed_branches(text_scale: float, subject_scales: Sequence[float]) -> list[Branch]:
    """Those with a weight in `guide`: s_t for full, s_i − s_t for image, 1 − s_i for nothing. One that has none may be
    replaced by the other in the formula. subject_scales: s_i of each image."""
    branches: list[Branch] = ["full"]
    if any(scale != text_scale for scale in subject_scales):
        branches.append("image")
    if any(scale != 1 for scale in subject_scales):
        branches.append("nothing")
    return branches


def hold_contrast(guided: Tensor, full: Tensor, share: float) -> Tensor:
    """Rescales `guided` toward the standard deviation of `full`, by `share`, 0..1 (Lin et al. 2024,
    arXiv 2305.08891, section 3.4). Where a schedule ends in pure noise, guidance makes colors glare without it."""
    held: Tensor = rescale_noise_cfg(guided, full, guidance_rescale=share) if share else guided
    return held
