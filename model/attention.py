"""Attention as every block computes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_PLAIN = 2**20
"""Scores of one head: more of them are never held at once."""


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d)·V. query: (B, H, S, d); key, value: (B, H, T, d); mask: bool, false where a score does not count,
    or added to the scores, broadcast to (B, H, S, T). Returns (B, H, S, d).

    On a CPU, the backward pass of PyTorch's fused kernel takes longer than plain products, which are taken there while
    the scores are few: a training step on the toy models then takes two thirds of the time.
    """
    plain = query.device.type == "cpu" and torch.is_grad_enabled() and query.shape[-2] * key.shape[-2] <= LARGEST_PLAIN
    if not plain:
        return functional.scaled_dot_product_attention(query, key, value, mask)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    out: Tensor = scores.softmax(dim=-1).to(value.dtype) @ value
    return out
