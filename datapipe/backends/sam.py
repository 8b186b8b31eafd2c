"""SAM, in two implementations of one model: transformers' port, and `segment_anything` for original checkpoints.

Both get the same pixels: RGB in 0..255, longer side resized to the model's, normalised, padded below and to the right.
transformers' port also takes SAM 2, which wants its images stretched to the square instead.

Half precision is for the image encoder, where nearly all of the arithmetic is. The decoder keeps float32: to bfloat16,
box corners less than 4 pixels of 1024 apart are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate
from transformers import AutoModelForMaskGeneration

from datapipe.backends.loading import ModelSettings, device_of, dtype_of, load_checkpoint, load_model
from datapipe.errors import BackendError
from datapipe.schema import RLE

_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_STD = np.array([58.395, 57.12, 57.375], np.float32)
STABILITY_OFFSET = 1.0
"""Of the mask threshold, in logits. segment_anything's automatic mask generator."""
_LOGITS_AT_ONCE = 1 << 26
"""Of masks that are upscaled together (256 MiB): at image resolution masks are what takes the memory."""

Boxes = Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Segment:
    """The mask of one box at image resolution. `predicted_iou`: the model's own estimate; `stability`: see
    `stability_score`."""

    mask: RLE
    predicted_iou: float
    stability: float


class _Sam:
    """What both implementations share. The encoder runs once per image, all of its boxes go through one decoder
    call."""

    side: int
    """Pixels of the square that the encoder sees."""

    def __init__(self, settings: ModelSettings) -> None:
        self._device, self._dtype = device_of(settings), dtype_of(settings)

    @torch.inference_mode()
    def __call__(self, images: Sequence[NDArray[np.uint8]], boxes: Sequence[Boxes]) -> list[list[Segment]]:
        """`images`: (H, W, 3) uint8 RGB each; `boxes`: (x1, y1, x2, y2) pixels, any number for each image."""
        embeddings = self._encode(torch.stack([self._pixels(i) for i in images]))
        return [self._segments(e, i, b) for e, i, b in zip(embeddings, images, boxes, strict=True)]

    def _encode(self, pixels: torch.Tensor) -> Sequence[Any]:
        """(B, 3, S, S) -> for each image its embedding, float32."""
        raise NotImplementedError

    def _decode(self, embedding: Any, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An embedding and (N, 4) float32 in pixels of the square -> mask logits (N, h, w) and predicted IoU (N,)."""
        raise NotImplementedError

    def _pixels(self, image: NDArray[np.uint8]) -> torch.Tensor:
        height, width = self._resized(image)
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR), np.float32)
        square = np.zeros((3, self.side, self.side), np.float32)
        square[:, :height, :width] = ((resized - _MEAN) / _STD).transpose(2, 0, 1)
        return torch.from_numpy(square).to(self._device, self._dtype)

    def _resized(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        scale = self.side / max(image.shape[:2])
        return max(1, int(image.shape[0] * scale + 0.5)), max(1, int(image.shape[1] * scale + 0.5))

    def _segments(self, embedding: torch.Tensor, image: NDArray[np.uint8], boxes: Boxes) -> list[Segment]:
        if not boxes:
            return []
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
            square = interpolate(chunk, (self.side, self.side), mode="bilinear", align_corners=False)
            full = interpolate(square[..., :height, :width], image.shape[:2], mode="bilinear", align_corners=False)
            stable += stability_score(full[:, 0]).tolist()
            masks += list((full[:, 0] > 0).cpu().numpy())
        return [
            Segment(_rle(mask), round(iou, 4), round(stability, 4))
            for mask, iou, stability in zip(masks, ious.tolist(), stable, strict=True)
        ]


class TransformersSam(_Sam):
    """transformers' `SamModel`, or `Sam2Model`."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        in_float32 = settings.model_copy(update={"dtype": "float32"})
        self.model = load_model(in_float32, AutoModelForMaskGeneration.from_pretrained)
        kind = self.model.config.model_type
        if kind not in ("sam", "sam2", "sam2_video"):
            raise BackendError(f"segment.model {settings.model}: a {kind} model, where sam or sam2 is wanted")
        self._is_second = kind != "sam"
        side = self.model.config.prompt_encoder_config.image_size
        self.side = side if isinstance(side, int) else side[0]
        self.model.vision_encoder.to(self._dtype)
        if self._is_second:
            # These two of the decoder's layers belong to the encoding.
            self.model.mask_decoder.conv_s0.to(self._dtype)
            self.model.mask_decoder.conv_s1.to(self._dtype)

    def _resized(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        return (self.side, self.side) if self._is_second else super()._resized(image)

    def _encode(self, pixels: torch.Tensor) -> Sequence[Any]:
        """SAM: (B, C, S/p, S/p); SAM 2: for each image its maps of every resolution, the finest first."""
        found = self.model.get_image_embeddings(pixels)
        if self._is_second:
            return list(zip(*(one.float() for one in found), strict=True))
        return list(found.float())

    def _decode(self, embedding: Any, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch_of_one = [one[None] for one in embedding] if self._is_second else embedding[None]
        out = self.model(image_embeddings=batch_of_one, input_boxes=boxes[None], multimask_output=False)
        return out.pred_masks[0, :, 0], out.iou_scores[0, :, 0]


class OriginalSam(_Sam):
    """`segment_anything`, for checkpoints of the original repository."""

    def __init__(self, settings: ModelSettings, architecture: str) -> None:
        super().__init__(settings)
        from segment_anything import sam_model_registry

        self.model = sam_model_registry[architecture]().to(self._device).eval()
        load_checkpoint(settings, self.model)
        self.model.image_encoder.to(self._dtype)
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
    are empty."""
    inner = (logits > STABILITY_OFFSET).sum((1, 2)).double()
    outer = (logits > -STABILITY_OFFSET).sum((1, 2)).double()
    return inner / outer.clamp(min=1)


def _rle(mask: NDArray[np.bool_]) -> RLE:
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return RLE((int(mask.shape[0]), int(mask.shape[1])), encoded["counts"].decode("ascii"))
