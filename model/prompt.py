"""The fused text-image prompt: "{caption}, the {tag0} is [PH0], the {tag1} is [PH1]", each placeholder an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from model.errors import ModelError


@dataclass(frozen=True)
class Prompts:
    """A batch of tokenized prompts.

    ids: (B, T) int64. placeholders: (B, K) int64, where each subject's placeholder is, -1 for none. tag_weights:
    (B, K, T) float32, 1/n on each of the n tokens of the subject's tag beside its placeholder, else 0.
    """

    ids: Tensor
    placeholders: Tensor
    tag_weights: Tensor

    def watched(self, tokens: Literal["both", "placeholder"]) -> Tensor:
        """The weightings of tokens whose attention is controlled: (B, T, K) or, for both, (B, T, 2·K), float32;
        columns are subjects' placeholders, then their tags."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        rows = (places == self.placeholders.unsqueeze(-1)).float()
        if tokens == "both":
            rows = torch.cat([rows, self.tag_weights], dim=1)
        return rows.transpose(1, 2)


class PromptTokenizer:
    """Writes fused prompts as token ids. The caption is cut short before any placeholder is lost; then tags are, from
    their front, so that their last word, the noun itself, stays."""

    def __init__(self, tokenizer: Any, length: int, max_subjects: int) -> None:
        """tokenizer: the base's; length: tokens of a prompt, with start and end (77 for Stable Diffusion)."""
        self._tokenizer = tokenizer
        self._start, self._end = tokenizer("")["input_ids"]
        self._pad = self._end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.length = length
        self.max_subjects = max_subjects

    def __call__(self, captions: Sequence[str], tags: Sequence[Sequence[str]]) -> Prompts:
        """captions: one an image; tags: its subjects', `max_subjects` at most. Raises ModelError when the prompt has no
        room for its subjects."""
        written = [self._write(caption, words) for caption, words in zip(captions, tags, strict=True)]
        ids, placeholders, weights = (torch.stack(parts) for parts in zip(*written, strict=True))
        return Prompts(ids, placeholders, weights)

    def _write(self, caption: str, tags: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        if len(tags) > self.max_subjects:
            raise ModelError(f"{len(tags)} subjects in {caption!r}: the model takes max_subjects={self.max_subjects}")
        the, is_, words = self._ids(", the"), self._ids("is"), [self._ids(tag) for tag in tags]
        room = self.length - 2
        around = len(tags) * (len(the) + len(is_) + 1)
        if room < around + len(tags):
            raise ModelError(f"{len(tags)} subjects do not fit into the text encoder's {self.length} tokens")
        if tags:
            words = [word[-((room - around) // len(tags)) :] for word in words]
        ids = [self._start, *self._ids(caption)[: room - around - sum(map(len, words))]]
        placeholders = torch.full((self.max_subjects,), -1, dtype=torch.int64)
        weights = torch.zeros(self.max_subjects, self.length)
        for k, word in enumerate(words):
            ids += the
            weights[k, len(ids) : len(ids) + len(word)] = 1 / max(len(word), 1)
            ids += word + is_
            placeholders[k] = len(ids)
            # Which id stands here is of no account: its embedding is replaced.
            ids.append(self._end)
        ids += [self._end, *[self._pad] * (self.length - len(ids) - 1)]
        return torch.tensor(ids, dtype=torch.int64), placeholders, weights

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


class ImageToWord(nn.Module):
    """A reference as one word: MLP(CLIP's class embedding) of Subject-Diffusion: LayerNorm, Linear, GELU, Linear."""

    def __init__(self, image_width: int, width: int, image_cls: bool) -> None:
        super().__init__()
        self.mlp: nn.Sequential | None = None
        self.null: nn.Parameter | None = None
        if image_cls:
            self.mlp = nn.Sequential(
                nn.LayerNorm(image_width), nn.Linear(image_width, width), nn.GELU(), nn.Linear(width, width)
            )
        else:
            self.null = nn.Parameter(torch.zeros(width))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """image_embeds: (B, K, image_width), CLIP's projected class embeddings. Returns (B, K, width)."""
        if self.null is not None:
            return self.null.expand(*image_embeds.shape[:2], -1)
        assert self.mlp is not None
        words: Tensor = self.mlp(image_embeds)
        return words


def encode_prompt(text_encoder: Any, ids: Tensor, placeholders: Tensor, words: Tensor, clip_skip: int = 0) -> Tensor:
    """CLIP's text encoder over a prompt in which words[k] stands in for the embedding of the token at placeholders[k],
    before positions are added.

    ids: (B, T) int64; placeholders: (B, K) int64, -1 for none; words: (B, K, D); clip_skip: how many of the last layers
    are left out. Returns (B, T, D), after the last norm. Raises ModelError.
    """
    layers = text_encoder.encoder.layers
    if not 0 <= clip_skip <= len(layers):
        raise ModelError(f"clip_skip={clip_skip}: the text encoder has {len(layers)} layers")
    embeddings = text_encoder.embeddings.token_embedding(ids)
    places = torch.arange(ids.shape[1], device=ids.device) == placeholders.unsqueeze(-1)
    fused = places.transpose(1, 2).to(words.dtype) @ words
    embeddings = torch.where(places.any(dim=1).unsqueeze(-1), fused.to(embeddings.dtype), embeddings)
    hidden = text_encoder.embeddings(inputs_embeds=embeddings)
    causal = create_causal_mask(
        config=text_encoder.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
    )
    for layer in layers[: len(layers) - clip_skip]:
        hidden = layer(hidden, causal, is_causal=True)
    encoded: Tensor = text_encoder.final_layer_norm(hidden)
    return encoded
