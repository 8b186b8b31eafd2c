"""SAM, in two implementations of one model: the port in transformers, and `segment_anything` for original checkpoints.

Both get the same pixels: RGB in 0..255, resized so that the longer side fits the model's square, normalized, padded
below and to the right. The port also takes SAM-HQ, which is shown images likewise, and SAM 2, SAM 2.1 and EdgeTAM,
which want them stretched to the square instead.

Only the image encoder, where nearly all of the arithmetic is, runs in half precision. The decoder stays in float32,
because bfloat16 cannot tell box corners apart that are less than 4 pixels of 1,024 apart.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate
from transformers import AutoModelForMaskGeneration

from datapipe.backends.loading import ModelSettings, device_of, dtype_of, load_model, load_original_checkpoint
from datapipe.backends.pixels import fill_normalized, levels, on_device
from datapipe.backends.protocol import Box, Pixels, Segment
from datapipe.backends.segmenters import SEGMENTERS, STRETCHED
from datapipe.schema import RLE
from subject_diffusion.errors import BackendError

_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_STD = np.array([58.395, 57.12, 57.375], np.float32)
_NORMALIZED = (levels() - _MEAN) / _STD
STABILITY_OFFSET = 1.0
"""How far the two thresholds of `stability_score` are from that of the mask, in logits. From the automatic mask
generator of segment_anything."""
_LOGITS_AT_ONCE = 1 << 26
"""Logits of the masks that are upscaled together (256 MiB), because masks at image resolution take most memory."""


@dataclass(frozen=True)
class Masks:
    """What the network says of an image's N boxes. `masks`: N of (H, W) bool; `ious`, `stable`: N each."""

    masks: list[NDArray[np.bool_]]
    ious: list[float]
    stable: list[float]


class _Sam:
    """What the implementations share. The encoder runs once per image; all boxes of an image go through the decoder
    together. Calls may overlap: the network takes one batch at a time."""

    side: int
    """Side of the square that the encoder sees, in pixels."""
    _encoder: torch.nn.Module

    def __init__(self, settings: ModelSettings) -> None:
        self._device, self._dtype = device_of(settings), dtype_of(settings)
        self._network = threading.Lock()

    def compile(self) -> None:
        """The image encoder is compiled in its next call."""
        self._encoder.compile()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels], boxes: Sequence[Sequence[Box]]) -> list[list[Segment]]:
        """See `Segmenter`."""
        pixels = on_device(self._pixels(images), self._device)
        with self._network:
            answers = self._answers(pixels, images, boxes)
        return [
            [
                Segment(RLE.of(mask), round(iou, 4), round(stability, 4))
                for mask, iou, stability in zip(answer.masks, answer.ious, answer.stable, strict=True)
            ]
            for answer in answers
        ]

    def _answers(self, pixels: torch.Tensor, images: Sequence[Pixels], boxes: Sequence[Sequence[Box]]) -> list[Masks]:
        """All that the GPU does for a batch: `pixels` (B, 3, S, S) -> the masks of each image's boxes."""
        embeddings = self._encode(pixels)
        return [self._masks(e, i, b) for e, i, b in zip(embeddings, images, boxes, strict=True)]

    def _encode(self, pixels: torch.Tensor) -> Sequence[Any]:
        """(B, 3, S, S) -> the embedding of each image, float32."""
        raise NotImplementedError

    def _decode(self, embedding: Any, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An embedding, and boxes (N, 4) float32 in pixels of the square -> mask logits (N, h, w) and predicted IoU
        (N,)."""
        raise NotImplementedError

    def _pixels(self, images: Sequence[Pixels]) -> torch.Tensor:
        """(B, 3, S, S) in the encoder's dtype."""
        squares = np.zeros((len(images), 3, self.side, self.side), np.float32)
        for square, image in zip(squares, images, strict=True):
            fill_normalized(square, image, *self._resized(image), _NORMALIZED)
        return torch.from_numpy(squares).to(self._dtype)

    def _resized(self, image: Pixels) -> tuple[int, int]:
        scale = self.side / max(image.shape[:2])
        return max(1, int(image.shape[0] * scale + 0.5)), max(1, int(image.shape[1] * scale + 0.5))

    def _masks(self, embedding: Any, image: Pixels, boxes: Sequence[Box]) -> Masks:
        if not boxes:
            return Masks([], [], [])
        height, width = self._resized(image)
        scale = torch.tensor([width / image.shape[1], height / image.shape[0]] * 2, dtype=torch.float64)
        scaled = (torch.tensor(boxes, dtype=torch.float64) * scale).float().to(self._device)
        logits, ious = self._decode(embedding, scaled)
        if not (logits.isfinite().all() and ious.isfinite().all()):
            raise FloatingPointError("the segmenter's output is not finite")
        masks: list[NDArray[np.bool_]] = []
        stable: list[float] = []
        at_once = max(1, _LOGITS_AT_ONCE // max(self.side**2, image.shape[0] * image.shape[1]))
        for chunk in torch.split(logits[:, None], at_once):
            full = self._upscaled(chunk, height, width, image)
            stable += stability_score(full[:, 0]).tolist()
            masks += list((full[:, 0] > 0).cpu().numpy())
        return Masks(masks, ious.tolist(), stable)

    def _upscaled(self, logits: torch.Tensor, height: int, width: int, image: Pixels) -> torch.Tensor:
        """(N, 1, h, w) logits of the square -> (N, 1, H, W) of the image, which fills `height` and `width` of the
        square. In two steps, as segment_anything does it."""
        square = interpolate(logits, (self.side, self.side), mode="bilinear", align_corners=False)
        return interpolate(square[..., :height, :width], image.shape[:2], mode="bilinear", align_corners=False)


class TransformersSam(_Sam):
    """`SamModel`, `SamHQModel`, `Sam2Model` or `EdgeTamModel` of transformers."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        in_float32 = settings.model_copy(update={"dtype": "float32"})
        self.model = load_model(in_float32, AutoModelForMaskGeneration)
        kind = self.model.config.model_type
        if kind not in SEGMENTERS:
            wanted = " or ".join(SEGMENTERS)
            raise BackendError(f"segment.model {settings.model}: a {kind} model, where {wanted} is wanted")
        self._stretches, self._is_hq = kind in STRETCHED, kind == "sam_hq"
        side = self.model.config.prompt_encoder_config.image_size
        self.side = side if isinstance(side, int) else side[0]
        self._encoder = self.model.vision_encoder.to(self._dtype)
        if self._stretches:
            # These two layers of the decoder are part of the encoding.
            self.model.mask_decoder.conv_s0.to(self._dtype)
            self.model.mask_decoder.conv_s1.to(self._dtype)

    def _resized(self, image: Pixels) -> tuple[int, int]:
        return (self.side, self.side) if self._stretches else super()._resized(image)

    def _upscaled(self, logits: torch.Tensor, height: int, width: int, image: Pixels) -> torch.Tensor:
        """SAM 2's own code goes from the decoder's resolution to the image's in one step; so does its processor."""
        if self._stretches:
            return interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
        return super()._upscaled(logits, height, width, image)

    def _encode(self, pixels: torch.Tensor) -> Sequence[Any]:
        """SAM: (B, C, S/p, S/p); SAM-HQ: per image this and the map of its first block with global attention, which is
        all that its decoder looks at; SAM 2 and EdgeTAM: per image, its maps of every resolution, the finest first."""
        found = self.model.get_image_embeddings(pixels)
        if self._stretches:
            return list(zip(*(one.float() for one in found), strict=True))
        if self._is_hq:
            embeddings, maps = found
            return list(zip(embeddings.float(), maps[0].float(), strict=True))
        return list(found.float())

    def _decode(self, embedding: Any, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps: dict[str, Any]
        if self._stretches:
            maps = {"image_embeddings": [one[None] for one in embedding]}
        elif self._is_hq:
            maps = {"image_embeddings": embedding[0][None], "intermediate_embeddings": [embedding[1][None]]}
        else:
            maps = {"image_embeddings": embedding[None]}
        out = self.model(**maps, input_boxes=boxes[None], multimask_output=False)
        return out.pred_masks[0, :, 0], out.iou_scores[0, :, 0]


class OriginalSam(_Sam):
    """`segment_anything`, for checkpoints of the original repository."""

    def __init__(self, settings: ModelSettings, architecture: str) -> None:
        super().__init__(settings)
        from segment_anything import sam_model_registry

        self.model = sam_model_registry[architecture]().to(self._device).eval()
        load_original_checkpoint(settings, self.model)
        self._encoder = self.model.image_encoder.to(self._dtype)
        self.side = self.model.image_encoder.img_size

    def _encode(self, pixels: torch.Tensor) -> Sequence[Any]:
        return list(self.model.image_encoder(pixels).float())

    def _decode(self, embedding: Any, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sparse, dense = self.model.prompt_encoder(points=None, boxes=boxes, masks=None)
        logits, ious = self.model.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return logits[:, 0], ious[:, 0]


def stability_score(logits: torch.Tensor) -> torch.Tensor:
    """(N, H, W) mask logits -> (N,) IoU of the masks at thresholds +1 and -1, as in segment_anything; 0 where both
    masks are empty."""
    inner = (logits > STABILITY_OFFSET).sum((1, 2)).double()
    outer = (logits > -STABILITY_OFFSET).sum((1, 2)).double()
    return inner / outer.clamp(min=1)
