"""The gated adapter and its tokens."""

from __future__ import annotations

import torch
from diffusers.models.attention import GatedSelfAttentionDense

from model.adapter import (
    BOX_WIDTH,
    GatedAdapter,
    SubjectTokens,
    TokenRun,
    fourier_boxes,
    pack_tokens,
)
from model.location import cells_of_grid, cells_reached


def test_rows_of_visual_tokens_equal_those_of_gligens_full_computation() -> None:
    torch.manual_seed(0)
    ours, gligen = GatedAdapter(32, 24, heads=4, head_width=8), GatedSelfAttentionDense(32, 24, 4, 8)
    with torch.no_grad():
        ours.alpha_attn.fill_(0.7)
        ours.alpha_dense.fill_(-0.3)
    gligen.load_state_dict(ours.state_dict())
    visual, subjects = torch.randn(2, 10, 32), torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(visual, ours.keys([TokenRun(subjects)])), gligen(visual, subjects))


def test_a_new_adapter_changes_nothing() -> None:
    visual = torch.randn(2, 10, 32)
    adapter = GatedAdapter(32, 24, 4, 8)
    assert torch.equal(adapter(visual, adapter.keys([TokenRun(torch.randn(2, 5, 24))])), visual)


def test_a_new_adapter_with_open_gates_changes_nothing_and_learns_at_once() -> None:
    torch.manual_seed(0)
    visual, tokens = torch.randn(2, 10, 32), [TokenRun(torch.randn(2, 5, 24))]
    adapter = GatedAdapter(32, 24, 4, 8)
    adapter.open_gates()
    found = adapter(visual, adapter.keys(tokens))
    assert torch.equal(found, visual)
    (found * torch.randn_like(found)).sum().backward()
    for output in (adapter.attn.to_out[0], adapter.ff.net[-1]):
        assert (output.weight.grad != 0).all()


def test_a_subject_within_its_box_changes_no_other_place() -> None:
    torch.manual_seed(0)
    tokens, adapter = SubjectTokens(16, 24, max_subjects=3, box_embedding=True), GatedAdapter(32, 24, 4, 8)
    for parameter in [*tokens.parameters(), adapter.alpha_attn, adapter.alpha_dense]:
        torch.nn.init.normal_(parameter)
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 1.0]]])
    present, patches, visual = torch.ones(1, 2, dtype=torch.bool), torch.randn(1, 2, 9, 16), torch.randn(1, 16, 32)
    changed = patches.clone()
    changed[:, 1] = torch.randn(9, 16)
    cells = cells_of_grid(cells_reached(boxes, present, 4, 4), 1)

    def adapted(patches: torch.Tensor, shares: torch.Tensor | None = None) -> torch.Tensor:
        runs = pack_tokens(tokens(patches, boxes, present), [2], 3, shares)
        found: torch.Tensor = adapter(visual, adapter.keys(runs), cells=cells)
        return found

    before, after = adapted(patches), adapted(changed)
    moved = (before - after).abs().amax(2).view(4, 4) > 0
    assert torch.equal(moved, torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool))
    # With several references a subject, and all slots' tokens at once, it is the same.
    twice = adapted(patches.repeat(1, 1, 2, 1), torch.full((1, 2, 2), 0.5))
    torch.testing.assert_close(twice, before)
    whole = TokenRun(tokens(patches, boxes, present), per_subject=9)
    torch.testing.assert_close(adapter(visual, adapter.keys([whole]), cells=cells), before)


def test_one_token_for_all_of_the_empty_slots_is_as_good_as_all_of_theirs() -> None:
    torch.manual_seed(0)
    tokens, adapter = SubjectTokens(16, 24, max_subjects=4, box_embedding=True), GatedAdapter(32, 24, 4, 8)
    for parameter in [*tokens.parameters(), adapter.alpha_attn, adapter.alpha_dense]:
        torch.nn.init.normal_(parameter)
    counts = [2, 2, 0, 4, 1]
    present = torch.arange(4) < torch.tensor(counts)[:, None]
    every = tokens(torch.randn(5, 4, 9, 16), torch.rand(5, 4, 4), present)
    packed = pack_tokens(every, counts, max_subjects=4)
    assert [(*run.tokens.shape[:2], run.copies) for run in packed] == [(2, 19, 18), (1, 1, 36), (1, 36, 1), (1, 10, 27)]
    visual = torch.randn(5, 10, 32)
    found, expected = (adapter(visual, adapter.keys(runs)) for runs in (packed, [TokenRun(every)]))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(adapter(visual, adapter.keys(packed), scale=0.5), expected, atol=1e-3)
    assert torch.equal(adapter(visual, adapter.keys(packed), scale=0.0), visual)


def test_the_same_reference_again_and_again_counts_as_one() -> None:
    torch.manual_seed(0)
    tokens, adapter = SubjectTokens(16, 24, max_subjects=3, box_embedding=True), GatedAdapter(32, 24, 4, 8)
    for parameter in [*tokens.parameters(), adapter.alpha_attn, adapter.alpha_dense]:
        torch.nn.init.normal_(parameter)
    counts, present = [3, 1, 0], torch.arange(3) < torch.tensor([3, 1, 0])[:, None]
    patches, boxes = torch.randn(3, 3, 4, 16), torch.rand(3, 3, 4)
    # The first subject's reference twice, the others' once beside an empty place.
    shares = torch.tensor([[1.0, 0.0]]).repeat(3, 3, 1)
    shares[:, 0] = 0.5
    visual = torch.randn(3, 10, 32)
    once = pack_tokens(tokens(patches, boxes, present), counts, 3)
    again = pack_tokens(tokens(patches.repeat(1, 1, 2, 1), boxes, present), counts, 3, shares)
    torch.testing.assert_close(adapter(visual, adapter.keys(again)), adapter(visual, adapter.keys(once)))


def test_boxes_become_sines_and_cosines_of_eight_frequencies() -> None:
    box = torch.tensor([0.1, 0.2, 0.6, 0.9])
    angles = [x * 100 ** (i / 8) for x in box.tolist() for i in range(8)]
    expected = [*torch.tensor(angles).sin().tolist(), *torch.tensor(angles).cos().tolist()]
    assert fourier_boxes(box).shape == (BOX_WIDTH,) == (64,)
    torch.testing.assert_close(fourier_boxes(box), torch.tensor(expected))


def test_tokens_do_not_depend_on_how_many_empty_slots_come_with_them_nor_on_what_those_hold() -> None:
    torch.manual_seed(0)
    tokens = SubjectTokens(16, 24, max_subjects=4, box_embedding=True)
    torch.nn.init.normal_(tokens.null_patch)
    patches, boxes = torch.randn(2, 3, 9, 16), torch.rand(2, 3, 4)
    present = torch.tensor([[True, False, False], [True, False, False]])
    all_slots, one_slot = tokens(patches, boxes, present), tokens(patches[:, :1], boxes[:, :1], present[:, :1])
    assert all_slots.shape == (2, 4 * 9, 24)
    torch.testing.assert_close(all_slots, one_slot)
    assert not torch.equal(tokens(patches, boxes, ~present)[:, :9], all_slots[:, :9])


def test_a_box_moves_its_own_subjects_tokens_only() -> None:
    tokens = SubjectTokens(16, 24, max_subjects=2, box_embedding=True)
    patches, boxes, present = torch.randn(1, 2, 9, 16), torch.rand(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
    moved = boxes.clone()
    moved[:, 1] = 0.5
    before, after = tokens(patches, boxes, present), tokens(patches, moved, present)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9:], after[:, 9:])
