"""The base's UNet, extended to take subjects: the same parameters under the same names, and, without subjects, the
same output bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.adapter import GatedAdapter, SubjectKeys, TokenRun
from model.attention import attention
from model.attention_control import AttentionMap, attention_with_probabilities
from model.errors import ModelError
from model.location import cells_of_grid


@dataclass(frozen=True)
class BlockKeys:
    """What one block's attentions read of the prompt and the subjects: the same at every step of sampling."""

    text_key: Tensor
    """(B, T, heads · head_width), as text_value."""
    text_value: Tensor
    subjects: Sequence[SubjectKeys]
    """Empty without adapters."""


class SubjectBlock(nn.Module):
    """What is added to one transformer block of the UNet: its adapter, and trained keys and values for its
    cross-attention, in place of the base's."""

    def __init__(self, width: int, text_width: int, heads: int, head_width: int, adapter: bool) -> None:
        super().__init__()
        self.adapter = GatedAdapter(width, text_width, heads, head_width) if adapter else None
        self.to_k = nn.Linear(text_width, heads * head_width, bias=False)
        self.to_v = nn.Linear(text_width, heads * head_width, bias=False)

    def keys(self, text: Tensor, tokens: Sequence[TokenRun]) -> BlockKeys:
        """text: (B, T, text_width); tokens: for the adapter, B rows in all."""
        subjects = [] if self.adapter is None else self.adapter.keys(tokens)
        return BlockKeys(self.to_k(text), self.to_v(text), subjects)

    def adapt(self, visual: Tensor, keys: BlockKeys, scale: float, cells: Tensor | None = None) -> Tensor:
        """visual: (B, S, width); keys: of `keys`; scale: β; cells: of `GatedAdapter.forward`. Returns (B, S, width), as
        it was without an adapter."""
        if self.adapter is None or not keys.subjects or scale == 0:
            return visual
        adapted: Tensor = self.adapter(visual, keys.subjects, scale, cells)
        return adapted

    def forward(
        self, visual: Tensor, text: Tensor, tokens: Sequence[TokenRun], scale: float, cells: Tensor | None = None
    ) -> tuple[Tensor, BlockKeys]:
        """Both at once, as training calls it: FSDP2 then gathers the block's weights once."""
        keys = self.keys(text, tokens)
        return self.adapt(visual, keys, scale, cells), keys


@dataclass(frozen=True)
class Subjects:
    """What a UNet call carries for its transformer blocks.

    blocks: one per transformer block, in the UNet's order. tokens: for the adapters, as many rows as the batch.
    keys: those of each block, if they were computed before; text and tokens are then not read. scale: β of the
    adapters. cells: (B, K, h, w) of `cells_reached`, from where each subject's tokens are attended to; None: from
    everywhere. watched: (B, T, W) weightings of the prompt's tokens whose attention is recorded into `maps` by the
    blocks whose downsampling is in `watched_at`.
    """

    blocks: nn.ModuleList
    tokens: Sequence[TokenRun] = ()
    keys: Sequence[BlockKeys] | None = None
    scale: float = 1.0
    cells: Tensor | None = None
    watched: Tensor | None = None
    watched_at: frozenset[int] = frozenset()
    maps: list[AttentionMap] = field(default_factory=list)


class SubjectTransformerBlock(nn.Module):
    """A transformer block of the UNet that lets its subjects in, between self- and cross-attention. The sub-modules are
    the base block's own; without subjects it computes what the base block computes."""

    def __init__(self, base: BasicTransformerBlock, index: int, place: int, downsampling: int) -> None:
        """index: of its `SubjectBlock`; place: among the blocks that follow one another without a convolution between;
        downsampling: latent pixels that one of its visual tokens spans."""
        super().__init__()
        self.norm1, self.attn1 = base.norm1, base.attn1
        self.norm2, self.attn2 = base.norm2, base.attn2
        self.norm3, self.ff = base.norm3, base.ff
        self.index, self.place = index, place
        self.downsampling = downsampling
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states: (B, S, width); encoder_hidden_states: (B, T, text_width). The signature is that of diffusers'
        block; of the rest, Stable Diffusion 1.x, 2.x and XL use nothing. Subjects come as
        `cross_attention_kwargs["subjects"]`."""
        subjects: Subjects | None = (cross_attention_kwargs or {}).get("subjects")
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out, probabilities = checkpoint(
                self._block, hidden_states, encoder_hidden_states, subjects, use_reentrant=False
            )
        else:
            out, probabilities = self._block(hidden_states, encoder_hidden_states, subjects)
        # Recorded here, outside what a checkpoint runs twice and a compiler may not see the side effects of.
        if probabilities is not None and subjects is not None:
            subjects.maps.append(AttentionMap(self.downsampling, probabilities))
        return out

    def _block(self, x: Tensor, text: Tensor | None, subjects: Subjects | None) -> tuple[Tensor, Tensor | None]:
        probabilities = None
        x = self.attn1(self.norm1(x)) + x
        if subjects is None:
            x = self.attn2(self.norm2(x), encoder_hidden_states=text) + x
        else:
            block: Any = subjects.blocks[self.index]
            cells = None if subjects.cells is None else cells_of_grid(subjects.cells, self.downsampling)
            if subjects.keys is None:
                x, keys = block(x, text, subjects.tokens, subjects.scale, cells)
            else:
                keys = subjects.keys[self.index]
                x = block.adapt(x, keys, subjects.scale, cells)
            watched = subjects.watched if self.downsampling in subjects.watched_at else None
            attended, probabilities = _cross_attention(self.attn2, keys, self.norm2(x), watched)
            x = attended + x
        return self.ff(self.norm3(x)) + x, probabilities


def _cross_attention(base: Any, keys: BlockKeys, x: Tensor, watched: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The base's cross-attention with the subject block's keys and values. watched: (B, T, W) or None; returns
    (B, S, width), and (B, W, S) or None."""

    def by_head(states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], base.heads, -1).transpose(1, 2)

    query, key, value = by_head(base.to_q(x)), by_head(keys.text_key), by_head(keys.text_value)
    probabilities = None
    if watched is None:
        out = attention(query, key, value)
    else:
        out, probabilities = attention_with_probabilities(query, key, value, watched)
    out = base.to_out[0](out.transpose(1, 2).flatten(-2))
    return base.to_out[1](out), probabilities


class Stem(nn.Conv2d):
    """The UNet's first convolution, which passes on what a `LocationConv` has already convolved."""

    def forward(self, sample: Tensor) -> Tensor:
        """sample: latents (B, in_channels, H, W) or features (B, out_channels, H, W)."""
        return sample if sample.shape[1] == self.out_channels else super().forward(sample)


def admit_subjects(unet: UNet2DConditionModel) -> None:
    """Makes a Stable Diffusion UNet take subjects, in place; does nothing the second time. Raises ModelError."""
    if isinstance(unet.conv_in, Stem):
        return
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock) and (block.norm_type != "layer_norm" or block.attn2 is None):
            raise ModelError(f"base UNet: its transformer blocks ({block.norm_type}) are not Stable Diffusion's")
    conv = unet.conv_in
    if conv.in_channels == conv.out_channels:
        raise ModelError(f"base UNet: as many channels after its first convolution as before it ({conv.in_channels})")
    stem = Stem(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, device="meta")
    stem.weight, stem.bias = conv.weight, conv.bias
    unet.conv_in = stem
    index = 0
    deepest = len(unet.down_blocks) - 1
    levels = [(block, level) for level, block in enumerate(unet.down_blocks)]
    levels += [(block, deepest - level) for level, block in enumerate(unet.up_blocks)]
    for parent, level in [*levels, (unet.mid_block, deepest)]:
        for transformer in parent.modules():
            if not isinstance(transformer, Transformer2DModel):
                continue
            for place, block in enumerate(transformer.transformer_blocks):
                transformer.transformer_blocks[place] = SubjectTransformerBlock(block, index, place, 2**level)
                index += 1


def transformer_blocks(unet: UNet2DConditionModel) -> list[SubjectTransformerBlock]:
    """The blocks that subjects enter, by index."""
    blocks = [block for block in unet.modules() if isinstance(block, SubjectTransformerBlock)]
    return sorted(blocks, key=lambda block: block.index)


def enable_gradient_checkpointing(unet: UNet2DConditionModel) -> None:
    """Checkpoints every ResNet and transformer block of the UNet."""
    unet.enable_gradient_checkpointing()
    for module in unet.modules():
        # A checkpoint around the block would have the block's side effect, the recorded map, inside.
        if isinstance(module, Transformer2DModel):
            module.gradient_checkpointing = False
