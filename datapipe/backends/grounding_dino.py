"""Grounding DINO, in two implementations of one model: transformers' port, and `groundingdino-py` for original
checkpoints.

Both get the same pixels and the same prompt. Labels are found by spans: each phrase knows its characters in the
prompt, the
tokenizer knows each token's, and so a box's score for a phrase is read off that phrase's own tokens.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer, BertModel

from datapipe.backends.loading import ModelSettings, device_of, dtype_of, load, load_checkpoint, load_model, locate
from datapipe.errors import BackendError

MAX_TOKENS = 256
"""Of a prompt: the length of the model's token logits."""

_SEPARATORS = (".", "?")
"""To the model these end a phrase, wherever they stand; what it says of them is no score."""

PAD_MULTIPLE = 32
"""Images are padded to a multiple of this many pixels, so that images of like size share a batch and none sees its
neighbours."""

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)

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
"""GroundingDINO_SwinT_OGC.py of the original repository, as data: its own loader would execute the file."""

CONFIGS = {"swint_ogc": SWIN_T_OGC, "swinb": {**SWIN_T_OGC, "backbone": "swin_B_384_22k"}}


@dataclass(frozen=True)
class Detection:
    """`phrase`: index into the phrases asked for; `box`: (x1, y1, x2, y2) pixels; scores are probabilities."""

    phrase: int
    box: tuple[float, float, float, float]
    score: float
    text_score: float


@dataclass(frozen=True)
class Prompt:
    """`tokens[i]`: positions of the tokens of phrase i. Phrases beyond the longest prompt have none."""

    text: str
    tokens: tuple[tuple[int, ...], ...]


def make_prompt(phrases: Sequence[str], tokenizer: Any) -> Prompt:
    """Phrases joined as "mug . fish . ", as many as fit; the model's own separator keeps them apart."""
    text, spans = "", []
    for phrase in phrases:
        longer = f"{text}{phrase.lower()} . "
        if len(tokenizer(longer.strip())["input_ids"]) > MAX_TOKENS:
            break
        spans.append((len(text), len(text) + len(phrase.lower())))
        text = longer
    offsets = tokenizer(text.strip(), return_offsets_mapping=True)["offset_mapping"]
    tokens = [
        tuple(i for i, (a, b) in enumerate(offsets) if start <= a < b <= end and text[a:b] not in _SEPARATORS)
        for start, end in spans
    ]
    return Prompt(text.strip(), (*tokens, *((),) * (len(phrases) - len(tokens))))


def detection_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) with the short side as asked, unless the long one would be too long; the original code's rule."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class _GroundingDino:
    """What both implementations share: pixels in, thresholded boxes out."""

    tokenizer: Any

    def __init__(self, settings: ModelSettings, short_side: int, long_side: int, floor: float, most: int) -> None:
        self._short, self._long, self._floor, self._most = short_side, long_side, floor, most
        self._device, self._dtype = device_of(settings), dtype_of(settings)

    @torch.inference_mode()
    def __call__(self, images: Sequence[NDArray[np.uint8]], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """`images`: (H, W, 3) uint8 RGB of one padded size; `phrases`: for each image. Best score first."""
        prompts = [make_prompt(p, self.tokenizer) for p in phrases]
        pixels, mask = self._pixels(images)
        # Weights stay float32, and with them the arithmetic of boxes: half the error of casting the whole model.
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            probabilities, boxes = self._forward(pixels, mask, [p.text for p in prompts])
        return [
            self._detections(p, b, prompt, image.shape[0], image.shape[1])
            for p, b, prompt, image in zip(probabilities, boxes, prompts, images, strict=True)
        ]

    def _forward(self, pixels: torch.Tensor, mask: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`pixels` (B, 3, H, W), `mask` (B, H, W) bool, True where there is image -> probabilities (B, Q, T) and
        boxes (B, Q, 4)
        as (cx, cy, w, h) in 0..1 of the unpadded image."""
        raise NotImplementedError

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image takes up in a batch, pixels: images of one padded size may share one."""
        resized = detection_size(height, width, self._short, self._long)
        tall, wide = (math.ceil(side / PAD_MULTIPLE) * PAD_MULTIPLE for side in resized)
        return tall, wide

    def _pixels(self, images: Sequence[NDArray[np.uint8]]) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = [detection_size(i.shape[0], i.shape[1], self._short, self._long) for i in images]
        padded = [self.padded_size(i.shape[0], i.shape[1]) for i in images]
        height, width = max(p[0] for p in padded), max(p[1] for p in padded)
        pixels = np.zeros((len(images), 3, height, width), np.float32)
        mask = np.zeros((len(images), height, width), bool)
        for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR), np.float32)
            pixels[i, :, :h, :w] = ((resized / 255 - _MEAN) / _STD).transpose(2, 0, 1)
            mask[i, :h, :w] = True
        return torch.from_numpy(pixels).to(self._device), torch.from_numpy(mask).to(self._device)

    def _detections(
        self, probabilities: torch.Tensor, boxes: torch.Tensor, prompt: Prompt, height: int, width: int
    ) -> list[Detection]:
        found = [i for i, tokens in enumerate(prompt.tokens) if tokens]
        if not found:
            return []
        by_phrase = [probabilities[:, list(prompt.tokens[i])] for i in found]
        if not (boxes.isfinite().all() and all(p.isfinite().all() for p in by_phrase)):
            raise FloatingPointError("the detector's output is not finite")
        text_scores, best = torch.stack([p.mean(1) for p in by_phrase], 1).max(1)
        scores = torch.stack([p.max(1).values for p in by_phrase], 1).max(1).values
        corners = _corners(boxes, height, width)
        detections = [
            Detection(found[best[i]], _rounded(corners[i]), round(float(scores[i]), 4), round(float(text_scores[i]), 4))
            for i in torch.nonzero(scores > self._floor).flatten().tolist()
        ]
        return sorted(detections, key=lambda d: (-d.score, d.box))[: self._most]


class TransformersGroundingDino(_GroundingDino):
    """transformers' `GroundingDinoForObjectDetection`."""

    def __init__(self, settings: ModelSettings, short_side: int, long_side: int, floor: float, most: int) -> None:
        super().__init__(settings, short_side, long_side, floor, most)
        self.tokenizer = load(settings, AutoTokenizer.from_pretrained)
        in_float32 = settings.model_copy(update={"dtype": "float32"})
        self.model = load_model(in_float32, AutoModelForZeroShotObjectDetection.from_pretrained)

    def _forward(self, pixels: torch.Tensor, mask: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.tokenizer(texts, padding="longest", return_tensors="pt").to(pixels.device)
        out = self.model(pixel_values=pixels, pixel_mask=mask.long(), **inputs)
        return out.logits.float().sigmoid(), out.pred_boxes.float()


class OriginalGroundingDino(_GroundingDino):
    """`groundingdino-py`, for checkpoints of the original repository. It computes in float32 only."""

    def __init__(
        self,
        settings: ModelSettings,
        text_encoder: str,
        config: str,
        short_side: int,
        long_side: int,
        floor: float,
        most: int,
    ) -> None:
        super().__init__(settings, short_side, long_side, floor, most)
        self._dtype = torch.float32
        text_encoder = locate(ModelSettings(model=text_encoder))
        try:
            self.model = build_original({**CONFIGS[config], "text_encoder_type": text_encoder})
        except (OSError, ValueError) as error:
            raise BackendError(
                f"ground.text_encoder {text_encoder}: cannot be loaded; give the folder of a bert-base-uncased"
            ) from error
        # Unused, or computed from the sizes: not in every published checkpoint.
        load_checkpoint(settings, self.model, may_miss=r"relative_position_index|position_ids|bert\.pooler")
        self.model = self.model.to(self._device).eval()
        self.tokenizer = self.model.tokenizer

    def _forward(self, pixels: torch.Tensor, mask: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        from groundingdino.util.misc import NestedTensor

        out = self.model(NestedTensor(pixels, ~mask), captions=texts)
        return out["pred_logits"].float().sigmoid(), out["pred_boxes"].float()


def build_original(arguments: dict[str, Any]) -> Any:
    """The original model of these arguments (the names of its config files), with random weights but for its text
    encoder."""
    from groundingdino.models import build_model

    _restore_bert_methods()
    with contextlib.redirect_stdout(io.StringIO()):
        return build_model(SimpleNamespace(device="cpu", **arguments))


def _restore_bert_methods() -> None:
    """groundingdino-py 0.4.0 calls three methods of BertModel that transformers 5 removed; their meaning here is
    small."""

    def get_extended_attention_mask(self: Any, mask: torch.Tensor, shape: Any, *_: Any) -> torch.Tensor:
        """(B, L) or (B, L, L), 1 for seen -> (B, 1, 1 or L, L), 0 for seen and the lowest number for hidden."""
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
    cx, cy, w, h = boxes.cpu().double().unbind(1)
    corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1).clamp(0, 1)
    return corners * torch.tensor([width, height, width, height], dtype=torch.float64)


def _rounded(box: torch.Tensor) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (round(v, 2) for v in box.tolist())
    return x1, y1, x2, y2
