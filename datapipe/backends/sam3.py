"""SAM 3: boxes and masks for phrases in one model (Carion et al. 2025, arXiv 2511.16719), by the port in transformers.

Each phrase is asked about by itself, so that phrases do not see each other; the image is encoded once for all of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import AutoConfig, Sam3LiteTextModel, Sam3Model

from datapipe.backends.loading import ModelSettings, device_of, dtype_of, load, load_model, load_tokenizer
from datapipe.backends.pixels import fill_normalized, levels, on_device
from datapipe.backends.protocol import Box, Detection, Grounding, Pixels, Segment
from datapipe.schema import RLE

MAX_TOKENS = 32
"""The most tokens of a phrase: the length that the text encoder was trained with."""

_CLASSES = {"sam3": Sam3Model, "sam3_video": Sam3Model, "sam3_lite_text": Sam3LiteTextModel}
_MEAN = _STD = np.full(3, 0.5, np.float32)
_NORMALIZED = (levels() / np.float32(255) - _MEAN) / _STD
PHRASES_AT_ONCE = 8
"""The most phrases asked about together, because each takes memory of its own in the decoder."""
_SURER, _LESS_SURE = (1 / (1 + math.exp(-logit)) for logit in (1.0, -1.0))
"""Probabilities between which a stable mask hardly changes: those of `sam.stability_score`."""


@dataclass(frozen=True)
class _Found:
    """One of the model's answers. `mask`: (h, w) probabilities, smaller than the image."""

    phrase: int
    score: float
    box: Box
    mask: torch.Tensor


class Sam3:
    """See `Grounder`; its detections have masks. Calls may overlap: the network takes one batch at a time.

    A box's score is the product of the phrase's presence in the image and of the box's own; as in transformers' own
    processing. `floor`: the score above which a box is kept; `most`: boxes per image.
    """

    def __init__(self, settings: ModelSettings, floor: float, most: int) -> None:
        self._device, self._dtype = device_of(settings), dtype_of(settings)
        self._floor, self._most = floor, most
        self._tokenizer = load_tokenizer(settings)
        kind = load(settings, AutoConfig.from_pretrained).model_type
        self._model = load_model(settings.model_copy(update={"dtype": "float32"}), _CLASSES[kind])
        side = self._model.config.vision_config.backbone_config.image_size
        self.side = side if isinstance(side, int) else side[0]
        self._network, self._prompting = threading.Lock(), threading.Lock()

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """See `Grounder`: every image is stretched to the model's square."""
        return self.side, self.side

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels], phrases: Sequence[Sequence[str]]) -> list[Grounding]:
        """See `Grounder`."""
        pixels = on_device(self._pixels(images), self._device)
        prompts = [self._prompts(asked) for asked in phrases]
        # Weights stay float32, and so does the arithmetic of boxes.
        with self._network, torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            seen = self._model.get_vision_features(pixels)
            found = [
                self._ask(_rows(seen, [i]), asked, image)
                for i, (asked, image) in enumerate(zip(prompts, images, strict=True))
            ]
        return [
            Grounding(
                tuple(Detection(o.phrase, o.box, o.score, o.score, None, _segment(o.mask, image)) for o in own),
                tuple(i for i in range(len(asked)) if i not in prompt),
            )
            for own, asked, prompt, image in zip(found, phrases, prompts, images, strict=True)
        ]

    def _pixels(self, images: Sequence[Pixels]) -> torch.Tensor:
        """(B, 3, S, S) float32."""
        squares = np.zeros((len(images), 3, self.side, self.side), np.float32)
        for square, image in zip(squares, images, strict=True):
            fill_normalized(square, image, self.side, self.side, _NORMALIZED)
        return torch.from_numpy(squares)

    def _prompts(self, phrases: Sequence[str]) -> dict[int, list[int]]:
        """The tokens of each phrase that is short enough, by its index."""
        with self._prompting:  # a fast tokenizer raises when two threads use it
            encoded = {i: self._tokenizer(phrase.lower())["input_ids"] for i, phrase in enumerate(phrases)}
        return {i: ids for i, ids in encoded.items() if len(ids) <= MAX_TOKENS}

    def _ask(self, seen: Any, prompts: dict[int, list[int]], image: Pixels) -> list[_Found]:
        """What is found of each phrase in an image, whose features are `seen`; the best scores first."""
        found: list[_Found] = []
        phrases = list(prompts)
        for start in range(0, len(phrases), PHRASES_AT_ONCE):
            asked = phrases[start : start + PHRASES_AT_ONCE]
            ids = torch.full((len(asked), MAX_TOKENS), self._tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, phrase in enumerate(asked):
                ids[row, : len(prompts[phrase])] = torch.tensor(prompts[phrase])
                mask[row, : len(prompts[phrase])] = 1
            out = self._model(
                vision_embeds=_rows(seen, [0] * len(asked)),
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
            )
            scores = out.pred_logits.float().sigmoid() * out.presence_logits.float().sigmoid()
            kept = scores > self._floor
            rows = torch.nonzero(kept)[:, 0].tolist()
            # Of hundreds of masks for each phrase, a few are wanted.
            masks = out.pred_masks[kept].float().sigmoid().cpu()
            if not all(one.isfinite().all() for one in (scores, out.pred_boxes, masks)):
                raise FloatingPointError("the detector's output is not finite")
            answers = zip(rows, scores[kept].tolist(), out.pred_boxes[kept].float().cpu(), masks, strict=True)
            for row, score, box, mask in answers:
                found.append(_Found(asked[row], round(score, 4), _pixels_of(box, image), mask.clone()))
        return sorted(found, key=lambda one: (-one.score, one.box))[: self._most]


def _segment(mask: torch.Tensor, image: Pixels) -> Segment:
    full = interpolate(mask[None, None], image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    inner, outer = int((full > _SURER).sum()), int((full > _LESS_SURE).sum())
    return Segment(RLE.of((full > 0.5).numpy()), None, round(inner / max(outer, 1), 4))


def _pixels_of(box: torch.Tensor, image: Pixels) -> Box:
    """(x1, y1, x2, y2) in 0..1 -> pixels within the image."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (box.double().clamp(0, 1) * torch.tensor([width, height, width, height])).tolist()
    return round(x1, 2), round(y1, 2), round(x2, 2), round(y2, 2)


def _rows(seen: Any, rows: list[int]) -> Any:
    """These rows of the features of a batch, at each of their levels."""
    return type(seen)(
        fpn_hidden_states=tuple(level[rows] for level in seen.fpn_hidden_states),
        fpn_position_encoding=tuple(level[rows] for level in seen.fpn_position_encoding),
    )
