"""Attention control: keeps the image's attention to a subject's tokens within the subject's region."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from model.attention import attention


@dataclass(frozen=True)
class AttentionMap:
    """How much each location of one layer attends to the watched tokens.

    probabilities: (B, W, S), for W weightings of the prompt's tokens and S = ceil(h / downsampling) ·
    ceil(w / downsampling) locations of an (h, w) latent, in row-major order; mean over the heads.
    """

    downsampling: int
    probabilities: Tensor


def attention_with_probabilities(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ/√d)·[V, w]: attention, and its total on chosen tokens, from one call of `attention`.

    A token's probability is the attention's output for a value that is 1 at that token and 0 elsewhere. The weights
    are therefore extra columns of V, and a fused kernel never materializes the S x T matrix, forward or backward.

    query: (B, H, S, d); key, value: (B, H, T, d); weights: (B, T, W), one-hot columns or means of them.
    Returns (B, H, S, d), and (B, W, S) float32: Σₜ wₜ·pₜ, mean over the heads.
    """
    batch, heads, tokens, width = value.shape
    watched = weights.shape[-1]
    # Fused kernels want the width of V to be a multiple of 8.
    columns = functional.pad(weights.to(value.dtype), (0, -watched % 8))
    columns = columns.unsqueeze(1).expand(batch, heads, tokens, -1)
    out = attention(query, key, torch.cat([value, columns], dim=-1))
    return out[..., :width], out[..., width : width + watched].float().mean(dim=1).transpose(1, 2)


def paper_loss(probabilities: Tensor, mask: Tensor) -> Tensor:
    """|CA − M|, mean over the locations (Subject-Diffusion, attention map control).

    probabilities: (B, W, S); mask: (B, W, S) in 0..1. Returns (B, W).
    """
    return (probabilities - mask).abs().mean(dim=-1)


def balanced_loss(probabilities: Tensor, mask: Tensor) -> Tensor:
    """mean(A·bg)/mean(bg) − mean(A·fg)/mean(fg) (FastComposer's balanced L1; Subject-Diffusion's released code).

    probabilities: (B, W, S); mask: (B, W, S) in 0..1, fg = mask and bg = 1 − mask. Returns (B, W).
    """

    def mean_over(region: Tensor) -> Tensor:
        return (probabilities * region).sum(dim=-1) / (region.sum(dim=-1) + 1e-5)

    return mean_over(1 - mask) - mean_over(mask)


def attention_loss(
    maps: Iterable[AttentionMap], masks: Tensor, watched: Tensor, kind: Literal["balanced", "paper"]
) -> Tensor:
    """The loss of each image: mean over its watched tokens; over layers the sum for `paper`, (1/N) Σₖ Σₗ |CAₗ − Mₖ|,
    and the mean for `balanced`, as FastComposer has it.

    masks: (B, W, h, w) at the latent's size, 0..1, the subject of each watched weighting; watched: (B, W) bool, which
    weightings count. Returns (B,) float32; 0 for an image in which none counts.
    """
    measure, sizes = (balanced_loss if kind == "balanced" else paper_loss), masks.shape[-2:]
    by_layer = []
    for layer in maps:
        side = (math.ceil(sizes[0] / layer.downsampling), math.ceil(sizes[1] / layer.downsampling))
        mask = functional.adaptive_avg_pool2d(masks.float(), side).flatten(-2)
        by_layer.append(measure(layer.probabilities, mask))
    per_token = torch.stack(by_layer).sum(dim=0)
    if kind == "balanced":
        per_token = per_token / len(by_layer)
    counts = watched.sum(dim=-1)
    return (per_token * watched).sum(dim=-1) / counts.clamp(min=1)
