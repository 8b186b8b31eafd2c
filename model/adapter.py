"""The gated adapter: the reference's patch features, with their boxes, enter every transformer block of the UNet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention import Attention, FeedForward
from torch import Tensor, nn
from torch.nn import functional

FREQUENCIES = 8
BOX_WIDTH = 4 * 2 * FREQUENCIES
"""Four coordinates, each as sine and cosine of eight frequencies: 64."""


def fourier_boxes(boxes: Tensor) -> Tensor:
    """Fourier(box) of GLIGEN: sin and cos of f·x for f = 100^(i/8), i = 0..7, and each coordinate x.

    boxes: (..., 4) xyxy, 0..1 of the image. Returns (..., 64) float32.
    """
    scales = torch.exp(math.log(100.0) / FREQUENCIES * torch.arange(FREQUENCIES, device=boxes.device))
    angles = (boxes.float().unsqueeze(-1) * scales).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SubjectTokens(nn.Module):
    """h = MLP([v, Fourier(box)]): one token for each patch of each reference (Subject-Diffusion, dense image features).

    Slots without a subject hold learned null features, as in GLIGEN, and there are always `max_subjects` slots: a
    subject is then seen the same way whatever the number of others that its batch has room for.
    """

    def __init__(self, patch_width: int, width: int, max_subjects: int, box_embedding: bool) -> None:
        super().__init__()
        self.max_subjects = max_subjects
        self.null_patch = nn.Parameter(torch.zeros(patch_width))
        self.null_box = nn.Parameter(torch.zeros(BOX_WIDTH)) if box_embedding else None
        self.mlp = nn.Sequential(
            nn.Linear(patch_width + (BOX_WIDTH if box_embedding else 0), width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, patches: Tensor, boxes: Tensor, present: Tensor) -> Tensor:
        """patches: (B, K, P, patch_width), CLIP's before its last norm; boxes: (B, K, 4) xyxy, 0..1;
        present: (B, K) bool; K <= max_subjects. Returns (B, max_subjects · P, width)."""
        empty = self.max_subjects - present.shape[1]
        filled = functional.pad(present, (0, empty))[..., None, None]
        patches = functional.pad(patches, (0, 0, 0, 0, 0, empty))
        features = torch.where(filled, patches, self.null_patch.to(patches.dtype))
        if self.null_box is not None:
            places = fourier_boxes(functional.pad(boxes, (0, 0, 0, empty))).to(patches.dtype).unsqueeze(2)
            places = torch.where(filled, places, self.null_box.to(patches.dtype))
            features = torch.cat([features, places.expand(*features.shape[:3], -1)], dim=-1)
        tokens: Tensor = self.mlp(features)
        return tokens.flatten(1, 2)


@dataclass(frozen=True)
class TokenRun:
    """Adapter tokens of consecutive rows of a batch."""

    tokens: Tensor
    """(R, M, width), the same number for each row."""
    copies: int = 1
    """How many equal tokens the last one stands for."""
    shares: Tensor | None = None
    """(R, M), how much of a token each counts for; None: 1. Where a subject has n references, a token of each counts
    for 1/n."""
    per_subject: int = 1
    """How many consecutive tokens a subject has."""


def pack_tokens(
    tokens: Tensor, counts: Sequence[int], max_subjects: int, shares: Tensor | None = None
) -> list[TokenRun]:
    """Leaves out what empty slots repeat: their tokens are all equal, so one stands for all of them.

    tokens: (B, max_subjects · n · P, width) of `SubjectTokens`, P for each of n references; counts: how many subjects
    each row has, in its first slots; shares: (B, K, n), what each reference counts for, 0 for none, 1 in all; None
    where n is 1. Returns one run for each stretch of rows with as many subjects.
    """
    slots, runs, start = tokens.shape[1], [], 0
    patches = slots // max_subjects // (1 if shares is None else shares.shape[-1])
    for count, rows in itertools.groupby(counts):
        stop = start + len(list(rows))
        kept = min(count * slots // max_subjects + 1, slots)
        of_tokens = None
        if shares is not None:
            of_tokens = shares[start:stop, :count].flatten(1).repeat_interleave(patches, dim=1)
            of_tokens = functional.pad(of_tokens, (0, kept - of_tokens.shape[1]), value=1.0)
        copies = max((max_subjects - count) * patches, 1)
        runs.append(TokenRun(tokens[start:stop, :kept], copies, of_tokens, slots // max_subjects))
        start = stop
    return runs


@dataclass(frozen=True)
class SubjectKeys:
    """One adapter's keys and values of a `TokenRun`."""

    key: Tensor
    """(R, M, heads · head_width), as value."""
    value: Tensor
    bias: Tensor | None
    """(R or 1, M), added to the scores: the log of what each token counts for; None: zeros."""
    per_subject: int = 1
    """Of `TokenRun`."""

    def mask(self, visual_tokens: int, cells: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The attention mask of S visual tokens over themselves and then the subjects' tokens. cells: (R, S, K) of
        `cells_of_grid`, or None. Returns (R or 1, 1, S, S + M), bool or added; None: nothing is masked."""
        bias = None
        if self.bias is not None:
            bias = functional.pad(self.bias, (visual_tokens, 0)).to(dtype)[:, None, None]
            bias = bias.expand(-1, 1, visual_tokens, -1)
        if cells is None:
            return bias
        tokens = self.key.shape[1]
        inside = cells[..., : tokens // self.per_subject].repeat_interleave(self.per_subject, dim=-1)
        inside = functional.pad(inside, (0, tokens - inside.shape[-1]), value=True)
        reached = functional.pad(inside, (visual_tokens, 0), value=True).unsqueeze(1)
        return reached if bias is None else torch.where(reached, bias, -torch.inf)


class GatedAdapter(nn.Module):
    """GLIGEN's gated self-attention, between a block's self- and cross-attention:

        L = L + β·tanh(γ)·S([L, h]),  L = L + β·tanh(γ')·FF(L),

    and γ = γ' = 0 at the start, unless `open_gates` is called.
    Only the visual tokens' rows of S are used, so only they are computed: subject tokens serve as keys and values.
    Parameters have GLIGEN's names.
    """

    def __init__(self, width: int, subject_width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(subject_width, width)
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(query_dim=width, heads=heads, dim_head=head_width)
        self.norm2 = nn.LayerNorm(width)
        self.ff = FeedForward(width, activation_fn="geglu")
        # Vectors of one, because FSDP2 splits no scalars.
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.alpha_dense = nn.Parameter(torch.zeros(1))

    def open_gates(self) -> None:
        """Sets γ = γ' = 1, so that the gates are at tanh(1) = 0.76. The adapter still changes nothing, because its last
        layers are zero instead, as in ControlNet's zero convolutions. A closed gate learns from one number, which
        untrained layers make nearly random; a last layer of zeros has a gradient for each of its weights."""
        with torch.no_grad():
            for gate in (self.alpha_attn, self.alpha_dense):
                gate.fill_(1.0)
            for output in (self.attn.to_out[0], self.ff.net[-1]):
                output.weight.zero_()
                output.bias.zero_()

    def keys(self, subjects: Sequence[TokenRun]) -> list[SubjectKeys]:
        """What the attention reads of the subjects, whatever the image and the noise."""
        found = []
        for run in subjects:
            normed = self.norm1(self.linear(run.tokens))
            key, value = self.attn.to_k(normed), self.attn.to_v(normed)
            bias = None if run.shares is None else run.shares.log().to(key.dtype)
            if run.copies > 1:
                bias = key.new_zeros(1, key.shape[1]) if bias is None else bias
                bias[:, -1] += math.log(run.copies)
            found.append(SubjectKeys(key, value, bias, run.per_subject))
        return found

    def forward(
        self, visual: Tensor, subjects: Sequence[SubjectKeys], scale: float = 1.0, cells: Tensor | None = None
    ) -> Tensor:
        """visual: (B, S, width); subjects: of `keys`, B rows in all; scale: β; cells: (B, S, K) of `cells_of_grid`:
        which subjects each visual token attends to; None: all. Returns (B, S, width)."""
        queries = self.norm1(visual)
        # The gates' own dtype would win over autocast's.
        gate, dense_gate = (scale * alpha.tanh().to(visual.dtype) for alpha in (self.alpha_attn, self.alpha_dense))
        visual = visual + gate * self._attend(queries, subjects, cells)
        visual = visual + dense_gate * self.ff(self.norm2(visual))
        return visual

    def _attend(self, visual: Tensor, subjects: Sequence[SubjectKeys], cells: Tensor | None) -> Tensor:
        def by_head(states: Tensor) -> Tensor:
            return states.view(*states.shape[:2], self.attn.heads, -1).transpose(1, 2)

        rows = [len(run.key) for run in subjects]
        parts = (layer(visual).split(rows) for layer in (self.attn.to_q, self.attn.to_k, self.attn.to_v))
        by_run = [None] * len(rows) if cells is None else torch.split(cells, rows)
        attended = []
        for query, key, value, run, inside in zip(*parts, subjects, by_run, strict=True):
            keys, values = torch.cat([key, run.key], dim=1), torch.cat([value, run.value], dim=1)
            mask = run.mask(query.shape[1], inside, query.dtype)
            found = functional.scaled_dot_product_attention(by_head(query), by_head(keys), by_head(values), mask)
            attended.append(found.transpose(1, 2).flatten(-2))
        out: Tensor = self.attn.to_out[0](torch.cat(attended))
        return out
