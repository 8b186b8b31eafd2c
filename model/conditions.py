"""What does not change over the steps of a sampling, computed once: keys and values of prompts and subjects, and the
location, for the branches of guidance that count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.adapter import pack_tokens
from model.guidance import Branch, needed_branches
from model.location import location_mask
from model.prompt import EncodedText
from model.subject_net import SubjectNet
from model.unet import BlockKeys


@dataclass(frozen=True)
class SeenSubjects:
    """The subjects of B prompts, as the image encoder sees them, in K slots, the first of which are filled."""

    classes: Tensor
    """(B, K, D); the mean of a subject's references."""
    patches: Tensor
    """(B, K, n · P, W), P for each of up to n references."""
    shares: Tensor
    """(B, K, n), what each reference counts for: 1 over the number of its subject's, 0 where there is none."""
    boxes: Tensor
    """(B, K, 4) xyxy, 0..1 of the image to draw."""
    present: Tensor
    """(B, K) bool."""
    counts: list[int]
    """How many each prompt has."""


@dataclass(frozen=True)
class Conditions:
    """For N images in R = N · branches rows, branch by branch."""

    branches: list[Branch]
    keys: list[BlockKeys]
    """Keys and values for each transformer block, R rows."""
    location: Tensor
    """(R, 1, h, w)."""
    cells: Tensor | None
    """(R, K, h, w) of `SubjectNet.cells_reached`."""
    subject_scale: Tensor
    """(N, 1, 1, 1): s_i, and 1 for an image without subjects: there is nothing to scale, and one branch less."""
    added: dict[str, Tensor] | None
    """Of `EncodedText.added`, R rows."""


def condition(
    net: SubjectNet,
    text: EncodedText,
    negative: EncodedText,
    subjects: SeenSubjects,
    size: tuple[int, int],
    time_ids: Tensor,
    *,
    text_scale: float,
    subject_scale: float,
    repeats: int,
) -> Conditions:
    """text, negative: B of `SubjectNet.encode_prompt`; size: (h, w) of the latents; time_ids: (6,) of
    `EncodedText.added`; text_scale, subject_scale: s_t and s_i of `guide`; repeats: images per prompt."""
    scales = [subject_scale if count else 1.0 for count in subjects.counts]
    branches = needed_branches(text_scale, scales)
    tokens = net.encode_subjects(subjects.patches, subjects.boxes, subjects.present)
    nobody = net.encode_subjects(subjects.patches, subjects.boxes, torch.zeros_like(subjects.present))
    location = location_mask(subjects.boxes, subjects.present, *size).to(net.dtype)
    none = [0] * len(subjects.counts)

    def rows(full: Tensor, image: Tensor, nothing: Tensor) -> Tensor:
        given = {"full": full, "image": image, "nothing": nothing}
        return torch.cat([given[branch] for branch in branches]).repeat_interleave(repeats, dim=0)

    runs = []
    if tokens is not None and nobody is not None:
        counts = [n for branch in branches for n in (none if branch == "nothing" else subjects.counts)]
        by_row = [n for n in counts for _ in range(repeats)]
        shares = subjects.shares if subjects.shares.shape[-1] > 1 else None
        runs = pack_tokens(
            rows(tokens, tokens, nobody),
            by_row,
            net.max_subjects,
            None if shares is None else rows(shares, shares, shares),
        )
    cells = net.cells_reached(subjects.boxes, subjects.present, size)
    every = text.followed_by(*[negative] * (len(branches) - 1)).repeated(repeats)
    return Conditions(
        branches,
        net.keys(every.states, runs),
        rows(location, location, torch.zeros_like(location)),
        None if cells is None else rows(cells, cells, torch.ones_like(cells)),
        every.states.new_tensor(scales).repeat_interleave(repeats)[:, None, None, None],
        every.added(time_ids.expand(len(every.states), -1)),
    )
