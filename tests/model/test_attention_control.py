"""Attention control: the probabilities come out of fused attention as they would out of the matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.attention_control import (
    AttentionMap,
    attention_loss,
    attention_with_probabilities,
    balanced_loss,
    paper_loss,
)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 77), st.integers(1, 9), st.integers(1, 10)
)
def test_probabilities_and_gradients_equal_those_of_the_materialised_matrix(
    batch: int, heads: int, places: int, tokens: int, watched: int, width: int
) -> None:
    g = torch.Generator().manual_seed(batch + 7 * places + 31 * tokens)
    query = torch.randn(batch, heads, places, width, generator=g, requires_grad=True)
    key = torch.randn(batch, heads, tokens, width, generator=g, requires_grad=True)
    value = torch.randn(batch, heads, tokens, width, generator=g, requires_grad=True)
    weights = torch.rand(batch, tokens, watched, generator=g)

    out, probabilities = attention_with_probabilities(query, key, value, weights)
    fused = torch.autograd.grad(out.square().sum() + probabilities.square().sum(), (query, key, value))

    matrix = torch.softmax(query @ key.transpose(-1, -2) / width**0.5, dim=-1)
    slow = torch.einsum("bhst,btw->bws", matrix, weights) / heads
    expected = torch.autograd.grad((matrix @ value).square().sum() + slow.square().sum(), (query, key, value))

    torch.testing.assert_close(out, matrix @ value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probabilities, slow, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(fused, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_paper_loss_is_the_mean_distance_to_the_mask() -> None:
    probabilities, mask = torch.tensor([[[0.2, 0.9, 0.0, 0.5]]]), torch.tensor([[[0.0, 1.0, 0.0, 1.0]]])
    torch.testing.assert_close(paper_loss(probabilities, mask), torch.tensor([[(0.2 + 0.1 + 0.0 + 0.5) / 4]]))


def test_the_balanced_loss_is_background_mean_less_foreground_mean() -> None:
    probabilities, mask = torch.tensor([[[0.2, 0.9, 0.0, 0.5]]]), torch.tensor([[[0.0, 1.0, 0.0, 1.0]]])
    torch.testing.assert_close(balanced_loss(probabilities, mask), torch.tensor([[0.1 - 0.7]]))


def test_attention_on_the_subject_costs_less_than_beside_it() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    on, beside = mask.flatten(-2) * 0.3, (1 - mask).flatten(-2) * 0.3
    for kind in ("paper", "balanced"):
        losses = [
            attention_loss([AttentionMap(1, p)], mask, torch.ones(1, 1, dtype=torch.bool), kind) for p in (on, beside)
        ]
        assert losses[0] < losses[1]


def test_layers_are_summed_for_paper_and_averaged_for_balanced_and_only_watched_tokens_count() -> None:
    g = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 2, 6, 5, generator=g) > 0.5).float()
    maps = [AttentionMap(1, torch.rand(2, 2, 30, generator=g)), AttentionMap(2, torch.rand(2, 2, 9, generator=g))]
    half = torch.nn.functional.adaptive_avg_pool2d(masks, (3, 3))
    watched = torch.tensor([[True, False], [False, False]])
    one = [paper_loss(maps[0].probabilities, masks.flatten(-2)), paper_loss(maps[1].probabilities, half.flatten(-2))]
    found = attention_loss(maps, masks, watched, "paper")
    torch.testing.assert_close(found, torch.stack([one[0][0, 0] + one[1][0, 0], torch.tensor(0.0)]))
    one = [
        balanced_loss(maps[0].probabilities, masks.flatten(-2)),
        balanced_loss(maps[1].probabilities, half.flatten(-2)),
    ]
    found = attention_loss(maps, masks, watched, "balanced")
    torch.testing.assert_close(found, torch.stack([(one[0][0, 0] + one[1][0, 0]) / 2, torch.tensor(0.0)]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_in_bfloat16_a_fused_kernel_takes_it() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = (torch.randn(2, 5, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1024, 77, 77))
    weights = torch.eye(77, 4, device="cuda").expand(2, -1, -1)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        _, probabilities = attention_with_probabilities(query, key, value, weights)
    matrix = torch.softmax(query.float() @ key.float().transpose(-1, -2) / 8, dim=-1)
    torch.testing.assert_close(probabilities, matrix[..., :4].mean(1).transpose(1, 2), rtol=0.02, atol=1e-3)
