"""Attention: the same with and without gradients, small and large."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import attention as module
from model.attention import attention


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(["none", "bool", "added"]), st.integers(0, 99))
def test_plain_products_are_the_fused_kernel(places: int, tokens: int, kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, 3, n, 4, generator=g, requires_grad=True) for n in (places, tokens, tokens))
    reached = torch.rand(2, 1, places, tokens, generator=g) < 0.5
    reached[..., 0] = True
    masks = {"none": None, "bool": reached, "added": torch.where(reached, torch.randn(tokens, generator=g), -torch.inf)}
    found = attention(query, key, value, masks[kind])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, masks[kind])
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.sin().sum(), (query, key, value)) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("gradients", "largest", "plain"), [(True, 64, True), (True, 63, False), (False, 64, False)])
def test_plain_products_are_for_few_scores_with_gradients(
    monkeypatch: pytest.MonkeyPatch, gradients: bool, largest: int, plain: bool
) -> None:
    fused = []

    def spy(*inputs: torch.Tensor | None) -> torch.Tensor | None:
        fused.append(inputs)
        return inputs[0]

    monkeypatch.setattr(module, "LARGEST_PLAIN", largest)
    monkeypatch.setattr("model.attention.functional.scaled_dot_product_attention", spy)
    with torch.set_grad_enabled(gradients):
        attention(*torch.randn(3, 1, 1, 8, 4))
    assert len(fused) == (0 if plain else 1)
