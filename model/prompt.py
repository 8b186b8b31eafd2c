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
        """tokenizer: the base's, the first where it has two; length: tokens of a prompt, with start and end (77 for
        Stable Diffusion)."""
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


@dataclass(frozen=True)
class EncodedText:
    """What the UNet reads of B prompts."""

    states: Tensor
    """(B, T, D), of each token."""
    pooled: Tensor | None = None
    """(B, P), of the whole prompt: Stable Diffusion XL's."""

    def followed_by(self, *others: EncodedText) -> EncodedText:
        """These prompts, then the others."""
        every = (self, *others)
        pooled = [text.pooled for text in every if text.pooled is not None]
        return EncodedText(torch.cat([text.states for text in every]), torch.cat(pooled) if pooled else None)

    def repeated(self, times: int) -> EncodedText:
        """Each prompt so many times, one after another."""
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(times, dim=0)
        return EncodedText(self.states.repeat_interleave(times, dim=0), pooled)

    def added(self, time_ids: Tensor) -> dict[str, Tensor] | None:
        """The UNet's `added_cond_kwargs`. time_ids: (B, 6), read by Stable Diffusion XL alone: height and width of the
        image before it was resized, top and left of what was cut out of it, height and width of that; pixels."""
        return None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": time_ids}


@dataclass(frozen=True)
class SecondTokens:
    """How Stable Diffusion XL's second text encoder reads what the first one's tokenizer wrote: the two share their
    vocabulary, but not their padding."""

    end: int
    """The token after a text."""
    pad: int
    """The second tokenizer's token for the places behind that."""
    zero_empty: bool
    """Whether an empty prompt is all zeros, as the base was trained without text: its `force_zeros_for_empty_prompt`.
    """

    def ends(self, ids: Tensor, placeholders: Tensor) -> Tensor:
        """(B,) int64: where the text of each prompt ends. A placeholder's own id is that of an end, too."""
        is_end = (ids == self.end) & ~_places(ids, placeholders).any(dim=1)
        return is_end.int().argmax(dim=1)

    def padded(self, ids: Tensor, ends: Tensor) -> Tensor:
        """The same ids for the second text encoder."""
        return ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) > ends.unsqueeze(-1), self.pad)

    def emptied(self, text: EncodedText, ends: Tensor) -> EncodedText:
        """With zeros for empty prompts, where the base has them."""
        if not self.zero_empty or text.pooled is None:
            return text
        empty = (ends == 1).unsqueeze(-1)
        return EncodedText(text.states.masked_fill(empty.unsqueeze(-1), 0), text.pooled.masked_fill(empty, 0))


def encode_prompt(text_encoder: Any, ids: Tensor, placeholders: Tensor, words: Tensor, clip_skip: int = 0) -> Tensor:
    """CLIP's text encoder over a prompt in which words[k] stands in for the embedding of the token at placeholders[k],
    before positions are added.

    ids: (B, T) int64; placeholders: (B, K) int64, -1 for none; words: (B, K, D); clip_skip: how many of the last layers
    are left out. Returns (B, T, D), after the last norm. Raises ModelError.
    """
    layers = len(text_encoder.encoder.layers)
    _check_clip_skip(clip_skip, layers)
    states = _hidden_states(text_encoder, ids, placeholders, words, layers - clip_skip)
    encoded: Tensor = text_encoder.final_layer_norm(states[-1])
    return encoded


def encode_prompt_twice(
    text_encoders: tuple[Any, Any],
    ids: Tensor,
    placeholders: Tensor,
    words: tuple[Tensor, Tensor],
    tokens: SecondTokens,
    clip_skip: int = 0,
) -> EncodedText:
    """As Stable Diffusion XL reads a prompt (arXiv 2307.01952, section 2.1): the states of two text encoders before
    their last layer, without a norm, side by side; and the second one's projection of the text's end. The words stand
    in both.

    text_encoders: CLIPTextModel and CLIPTextModelWithProjection; words: (B, K, D₁) and (B, K, D₂); the rest as for
    `encode_prompt`. Returns states (B, T, D₁ + D₂) and pooled (B, P). Raises ModelError.
    """
    first, second = text_encoders[0], text_encoders[1].text_model
    before_last = [len(encoder.encoder.layers) - 1 for encoder in (first, second)]
    _check_clip_skip(clip_skip, min(before_last))
    ends = tokens.ends(ids, placeholders)
    states = _hidden_states(first, ids, placeholders, words[0], before_last[0] - clip_skip)[-1]
    others = _hidden_states(second, tokens.padded(ids, ends), placeholders, words[1], before_last[1] + 1)
    states = torch.cat([states, others[before_last[1] - clip_skip]], dim=-1)
    at_end = others[-1][torch.arange(len(ids), device=ids.device), ends]
    pooled = text_encoders[1].text_projection(second.final_layer_norm(at_end))
    return tokens.emptied(EncodedText(states, pooled), ends)


def encode_for_base(
    text_encoder: Any, text_encoder_2: Any, ids: Tensor, tokens: SecondTokens | None, clip_skip: int | None = None
) -> EncodedText:
    """By the base's own text encoders, one or two. ids: (B, T) int64, without placeholders."""
    encoded = text_encoder(ids, output_hidden_states=True)
    if text_encoder_2 is None or tokens is None:
        states = encoded.last_hidden_state
        if clip_skip is not None:
            states = text_encoder.final_layer_norm(encoded.hidden_states[-(clip_skip + 1)])
        return EncodedText(states)
    ends, left = tokens.ends(ids, ids.new_zeros(len(ids), 0)), -2 - (clip_skip or 0)
    second = text_encoder_2(tokens.padded(ids, ends), output_hidden_states=True)
    states = torch.cat([encoded.hidden_states[left], second.hidden_states[left]], dim=-1)
    return tokens.emptied(EncodedText(states, second.text_embeds), ends)


def _check_clip_skip(clip_skip: int, most: int) -> None:
    if not 0 <= clip_skip <= most:
        raise ModelError(f"clip_skip={clip_skip}: the text encoder has {most} layers that can be left out")


def _places(ids: Tensor, placeholders: Tensor) -> Tensor:
    """(B, K, T) bool: where each subject's placeholder is."""
    return torch.arange(ids.shape[1], device=ids.device) == placeholders.unsqueeze(-1)


def _hidden_states(text_encoder: Any, ids: Tensor, placeholders: Tensor, words: Tensor, layers: int) -> list[Tensor]:
    """(B, T, D) each, before the first layer and after each of so many."""
    embeddings = text_encoder.embeddings.token_embedding(ids)
    places = _places(ids, placeholders)
    fused = places.transpose(1, 2).to(words.dtype) @ words
    embeddings = torch.where(places.any(dim=1).unsqueeze(-1), fused.to(embeddings.dtype), embeddings)
    hidden = text_encoder.embeddings(inputs_embeds=embeddings)
    causal = create_causal_mask(
        config=text_encoder.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
    )
    states = [hidden]
    for layer in text_encoder.encoder.layers[:layers]:
        states.append(layer(states[-1], causal, is_causal=True))
    return states
