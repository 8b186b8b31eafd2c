"""Grounding DINO, in two implementations of one model: the port in transformers, and `groundingdino-py` for original
checkpoints.

Both get the same pixels and the same prompt. Labels are found by spans: each phrase knows its characters in the
prompt, the tokenizer knows each token's, and so a box's score for a phrase is read from that phrase's own tokens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import math
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForZeroShotObjectDetection, BertModel

from datapipe.backends.loading import (
    ModelSettings,
    TextEncoderSettings,
    check_tokenizer,
    device_of,
    dtype_of,
    load_model,
    load_original_checkpoint,
    load_tokenizer,
    locate,
)
from datapipe.backends.pixels import fill_normalized, levels, on_device
from datapipe.backends.protocol import Detection, Grounding, Pixels
from datapipe.decoding import scaled_size
from subject_diffusion.errors import BackendError
from subject_diffusion.loading_bars import no_loading_bars

MAX_TOKENS = 256
"""The most tokens of a prompt: the length of the model's token logits."""

_SEPARATORS = (".", "?")
"""To the model these end a phrase, wherever they occur; the probability of one is not a score."""

_BUILT_IN = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
"""By these numbers the port in transformers finds where the phrases of a prompt end, whatever its tokenizer says."""

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_NORMALIZED = (levels() / np.float32(255) - _MEAN) / _STD

SWIN_T_OGC: dict[str, Any] = {
    "modelname": "groundingdino", "backbone": "swin_T_224_1k", "position_embedding": "sine", "pe_temperatureH": 20,
    "pe_temperatureW": 20, "return_interm_indices": [1, 2, 3], "backbone_freeze_keywords": None, "enc_layers": 6,
    "dec_layers": 6, "pre_norm": False, "dim_feedforward": 2048, "hidden_dim": 256, "dropout": 0.0, "nheads": 8,
    "num_queries": 900, "query_dim": 4, "num_patterns": 0, "num_feature_levels": 4, "enc_n_points": 4,
    "dec_n_points": 4,
    "two_stage_type": "standard", "two_stage_bbox_embed_share": False, "two_stage_class_embed_share": False,
    "transformer_activation": "relu", "dec_pred_bbox_embed_share": True, "dn_box_noise_scale": 1.0,
    "dn_label_noise_ratio": 0.5, "dn_label_coef": 1.0, "dn_bbox_coef": 1.0, "embed_init_tgt": True,
    "dn_labelbook_size": 2000, "max_text_len": 256, "text_encoder_type": "bert-base-uncased",
    "use_text_enhancer": True, "use_fusion_layer": True, "use_checkpoint": False, "use_transformer_ckpt": False,
    "use_text_cross_attention": True, "text_dropout": 0.0, "fusion_dropout": 0.0, "fusion_droppath": 0.1,
    "sub_sentence_present": True,
}  # fmt: skip
"""GroundingDINO_SwinT_OGC.py of the original repository, as data, because its own loader would execute the file."""

CONFIGS = {"swint_ogc": SWIN_T_OGC, "swinb": {**SWIN_T_OGC, "backbone": "swin_B_384_22k"}}


Separator = Literal["period", "comma"]
"""What stands between two phrases of a prompt."""


@dataclass(frozen=True)
class Asking:
    """How an image is shown to the model, what the model is asked, and how much of its answer is kept.

    `short_side`, `long_side`: pixels, see `scaled_size`; `pad_multiple`: pixels; `floor`: the score above which a
    box is kept; `most`: boxes per image.
    """

    short_side: int
    long_side: int
    pad_multiple: int
    separator: Separator
    floor: float
    most: int


@dataclass(frozen=True)
class Prompt:
    """What the model is asked. `tokens[i]`: positions of the tokens of phrase i; a phrase that was left out has none.
    `left_out`: indexes of the phrases for which there was no room."""

    text: str
    tokens: tuple[tuple[int, ...], ...]
    left_out: tuple[int, ...]


def make_prompt(phrases: Sequence[str], tokenizer: Any, separator: Separator = "period") -> Prompt:
    """The phrases joined as "mug . fish ." or "mug,fish.". A phrase for which there is no room is left out, and those
    after it that fit are not."""
    between, end = (" . ", " .") if separator == "period" else (",", ".")
    text, spans, left_out = "", dict[int, tuple[int, int]](), []
    for i, phrase in enumerate(phrases):
        start = len(text) + len(between) if text else 0
        longer = text + between * bool(text) + phrase.lower()
        if len(tokenizer(longer + end)["input_ids"]) > MAX_TOKENS:
            left_out.append(i)
            continue
        spans[i] = (start, len(longer))
        text = longer
    text = text + end if text else ""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    tokens = tuple(
        tuple(k for k, (a, b) in enumerate(offsets) if start <= a < b <= stop and text[a:b] not in _SEPARATORS)
        for start, stop in (spans.get(i, (0, 0)) for i in range(len(phrases)))
    )
    return Prompt(text, tokens, tuple(left_out))


class _GroundingDino:
    """What the implementations share: pixels in, thresholded boxes out. Calls may overlap: the network takes one batch
    at a time."""

    tokenizer: Any

    def __init__(self, settings: ModelSettings, asking: Asking) -> None:
        self._asking = asking
        self._device, self._dtype = device_of(settings), dtype_of(settings)
        self._network, self._prompting = threading.Lock(), threading.Lock()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels], phrases: Sequence[Sequence[str]]) -> list[Grounding]:
        """See `Grounder`."""
        prompts = self._prompts(phrases)
        pixels, mask = (on_device(tensor, self._device) for tensor in self._pixels(images))
        with self._network:
            probabilities, boxes = self._answers(pixels, mask, [p.text for p in prompts])
        return [
            Grounding(self._detections(p, b, prompt, image.shape[0], image.shape[1]), prompt.left_out)
            for p, b, prompt, image in zip(probabilities, boxes, prompts, images, strict=True)
        ]

    def _prompts(self, phrases: Sequence[Sequence[str]]) -> list[Prompt]:
        # A fast tokenizer raises when two threads use it: here it is a copy of the network's, and lent to one thread.
        with self._prompting:
            return [make_prompt(p, self._prompt_tokenizer, self._asking.separator) for p in phrases]

    @functools.cached_property
    def _prompt_tokenizer(self) -> Any:
        return copy.deepcopy(self.tokenizer)

    def _answers(self, pixels: torch.Tensor, mask: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What `_forward` returns, on the CPU: there the boxes are read while the GPU has the next batch."""
        # Weights stay float32, and so does the arithmetic of boxes: half the error of casting the whole model.
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            probabilities, boxes = self._forward(pixels, mask, texts)
        return probabilities.cpu(), boxes.cpu()

    def _forward(self, pixels: torch.Tensor, mask: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`pixels` (B, 3, H, W) and `mask` (B, H, W) bool, True on the image and False on padding -> probabilities
        (B, Q, T), and boxes (B, Q, 4) as (cx, cy, w, h) in 0..1 of the unpadded image."""
        raise NotImplementedError

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """See `Grounder`."""
        tall, wide = self._resized(height, width)
        multiple = self._asking.pad_multiple
        return math.ceil(tall / multiple) * multiple, math.ceil(wide / multiple) * multiple

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return scaled_size(height, width, self._asking.short_side, self._asking.long_side)

    def _pixels(self, images: Sequence[Pixels]) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = [self._resized(i.shape[0], i.shape[1]) for i in images]
        padded = [self.padded_size(i.shape[0], i.shape[1]) for i in images]
        height, width = max(p[0] for p in padded), max(p[1] for p in padded)
        pixels = np.zeros((len(images), 3, height, width), np.float32)
        mask = np.zeros((len(images), height, width), bool)
        for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            fill_normalized(pixels[i], image, h, w, _NORMALIZED)
            mask[i, :h, :w] = True
        return torch.from_numpy(pixels), torch.from_numpy(mask)

    def _detections(
        self, probabilities: torch.Tensor, boxes: torch.Tensor, prompt: Prompt, height: int, width: int
    ) -> tuple[Detection, ...]:
        found = [i for i, tokens in enumerate(prompt.tokens) if tokens]
        if not found:
            return ()
        by_phrase = [probabilities[:, list(prompt.tokens[i])] for i in found]
        if not (boxes.isfinite().all() and all(p.isfinite().all() for p in by_phrase)):
            raise FloatingPointError("the detector's output is not finite")
        text_scores, best = torch.stack([p.mean(1) for p in by_phrase], 1).max(1)
        best_tokens = torch.stack([p.max(1).values for p in by_phrase], 1)
        scores = best_tokens.max(1).values
        rivals = best_tokens.scatter(1, best[:, None], 0.0).max(1).values
        corners = _corners(boxes, height, width)
        numbers = torch.stack([scores, text_scores, rivals], 1).tolist()
        detections = [
            Detection(found[best[i]], _rounded(corners[i]), *(round(n, 4) for n in numbers[i]))
            for i in torch.nonzero(scores > self._asking.floor).flatten().tolist()
        ]
        return tuple(sorted(detections, key=lambda d: (-d.score, d.box))[: self._asking.most])


class TransformersGroundingDino(_GroundingDino):
    """`GroundingDinoForObjectDetection` of transformers."""

    def __init__(self, settings: ModelSettings, asking: Asking) -> None:
        super().__init__(settings, asking)
        self.tokenizer = load_tokenizer(settings)
        check_tokenizer(settings, self.tokenizer, _BUILT_IN)
        in_float32 = settings.model_copy(update={"dtype": "float32"})
        self.model = load_model(in_float32, AutoModelForZeroShotObjectDetection)

    def _forward(self, pixels: torch.Tensor, mask: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.tokenizer(texts, padding="longest", return_tensors="pt").to(pixels.device)
        out = self.model(pixel_values=pixels, pixel_mask=mask.long(), **inputs)
        return out.logits.float().sigmoid(), out.pred_boxes.float()


class OriginalGroundingDino(_GroundingDino):
    """`groundingdino-py`, for checkpoints of the original repository. It computes in float32 only."""

    def __init__(self, settings: ModelSettings, asking: Asking, text_encoder: str, config: str) -> None:
        super().__init__(settings, asking)
        self._dtype = torch.float32
        encoder = TextEncoderSettings(model=text_encoder)
        try:
            self.model = build_original({**CONFIGS[config], "text_encoder_type": locate(encoder)})
        except Exception as error:  # for broken files, transformers raises almost any class
            raise BackendError(
                f"{encoder.key} {text_encoder}: cannot be loaded; give the folder of a bert-base-uncased"
            ) from error
        check_tokenizer(encoder, self.model.tokenizer, _BUILT_IN)
        # These are unused, or computed from the sizes, and not in every published checkpoint.
        load_original_checkpoint(
            settings,
            self.model,
            may_miss=r"relative_position_index|position_ids|bert\.pooler",
            may_hold=r"label_enc\.weight|position_ids",
        )
        self.model = self.model.to(self._device).eval()
        self.tokenizer = self.model.tokenizer

    def _forward(self, pixels: torch.Tensor, mask: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        from groundingdino.util.misc import NestedTensor

        out = self.model(NestedTensor(pixels, ~mask), captions=texts)
        return out["pred_logits"].float().sigmoid(), out["pred_boxes"].float()


def build_original(arguments: dict[str, Any]) -> Any:
    """The original model, with random weights except in its text encoder. `arguments`: named as in its config files."""
    models = import_original()
    _restore_bert_methods()
    with contextlib.redirect_stdout(io.StringIO()), no_loading_bars():
        return models.build_model(SimpleNamespace(device="cpu", **arguments))


def import_original() -> ModuleType:
    """`groundingdino.models`, imported without yapf, which it needs only to print its configurations.

    yapf caches its grammar in the user's home, as a pickle that it puts in place before it is whole: of several
    processes that import it for the first time, some fail.
    """
    name = "yapf.yapflib.yapf_api"
    if name in sys.modules:
        return importlib.import_module("groundingdino.models")
    sys.modules[name] = ModuleType(name)
    sys.modules[name].FormatCode = None  # type: ignore[attr-defined]
    try:
        return importlib.import_module("groundingdino.models")
    finally:
        del sys.modules[name]


def _restore_bert_methods() -> None:
    """groundingdino-py 0.4.0 calls three methods of BertModel that transformers 5 removed; these do what it needs."""

    def get_extended_attention_mask(self: Any, mask: torch.Tensor, shape: Any, *_: Any) -> torch.Tensor:
        """(B, L) or (B, L, L), 1 where seen -> (B, 1, 1 or L, L), 0 where seen and the lowest number where hidden."""
        wide = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
        return (1.0 - wide.to(self.dtype)) * torch.finfo(self.dtype).min

    def get_head_mask(self: Any, mask: Any, layers: int, *_: Any) -> list[None]:
        return [None] * layers

    def invert_attention_mask(self: Any, mask: torch.Tensor) -> torch.Tensor:
        return get_extended_attention_mask(self, mask, None)

    for method in (get_extended_attention_mask, get_head_mask, invert_attention_mask):
        if not hasattr(BertModel, method.__name__):
            setattr(BertModel, method.__name__, method)


def _corners(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(Q, 4) (cx, cy, w, h) in 0..1 -> (x1, y1, x2, y2) pixels within the image."""
    cx, cy, w, h = boxes.double().unbind(1)
    corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1).clamp(0, 1)
    return corners * torch.tensor([width, height, width, height], dtype=torch.float64)


def _rounded(box: torch.Tensor) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (round(v, 2) for v in box.tolist())
    return x1, y1, x2, y2
