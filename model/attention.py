"""The cross-attentions' products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

FEW_KEYS = 128


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(QKᵀ/√d)·V. query: (B, H, S, d); key: (B, H, T, d); value: (B, H, T, e). Returns (B, H, S, e).

    With few keys, in bfloat16 on a CPU, the backward pass of PyTorch's fused kernel takes several times as long as that
    of plain products, which are taken there.
    """
    learns_on_cpu = torch.is_grad_enabled() and query.device.type == "cpu"
    if not (learns_on_cpu and query.dtype == torch.bfloat16 and key.shape[-2] <= FEW_KEYS):
        return functional.scaled_dot_product_attention(query, key, value)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    out: Tensor = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return out
