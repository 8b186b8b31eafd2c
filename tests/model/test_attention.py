"""The products of the cross-attentions."""

from __future__ import annotations

import pytest
import torch

from model.attention import FEW_KEYS, attention


@pytest.mark.parametrize("tokens", [1, 48, FEW_KEYS])
def test_plain_products_are_the_fused_kernels(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    exact = [torch.randn(2, 3, n, 8, generator=g, requires_grad=True) for n in (20, tokens, tokens)]

    def computed(dtype: torch.dtype) -> list[torch.Tensor]:
        out = attention(*(x.to(dtype) for x in exact))
        return [out.float(), *torch.autograd.grad(out.float().sin().sum(), exact)]

    fused = computed(torch.float32)
    monkeypatch.setattr("model.attention.functional.scaled_dot_product_attention", None)
    torch.testing.assert_close(computed(torch.bfloat16), fused, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("tokens", "dtype", "gradients"),
    [(FEW_KEYS + 1, torch.bfloat16, True), (8, torch.float32, True), (8, torch.bfloat16, False)],
)
def test_the_fused_kernel_computes_the_rest(
    monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype, gradients: bool
) -> None:
    fused = torch.nn.functional.scaled_dot_product_attention
    called = []

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        called.append(query)
        return fused(query, key, value)

    monkeypatch.setattr("model.attention.functional.scaled_dot_product_attention", spy)
    with torch.set_grad_enabled(gradients):
        attention(*torch.randn(3, 1, 1, tokens, 4, dtype=dtype))
    assert len(called) == 1
