"""How much a generated subject takes after its reference: it is found in the sample, cut out, and compared."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from datapipe.recipe import Recipe, build_stage
from datapipe.schema import Entity, Sample, StageName, Tag
from model import ModelError, Subject, prepare_reference, reference_tensor
from model.base import UNLOADABLE, first_line

Mask = NDArray[np.bool_]

QUANTILES = np.linspace(0.02, 0.98, 25)
CANVAS_PX = 64
"""Side of the squares that colours and patterns are compared on."""


@dataclass(frozen=True)
class SubjectScore:
    """Of one subject in one sample."""

    clip: float
    """Cosine of CLIP's embeddings of both cut out, on white."""
    colour: float
    """Distance of the colours inside both masks, whatever their places: mean difference of the quantiles of L, a and b
    (CIELAB)."""
    pattern: float
    """Distance of the colours at the same places, inside both masks, CIELAB."""
    found: float
    """1 where the detector finds the tag in the sample; else the box that was asked for is scored."""


class Locator:
    """Finds subjects in pictures with a dataset recipe's detector and segmenter."""

    def __init__(self, recipe: Recipe) -> None:
        self._stages = [build_stage(name, recipe) for name in (StageName.GROUND, StageName.SEGMENT)]

    def __call__(self, image: Image.Image, caption: str, subjects: Sequence[Subject]) -> list[Mask | None]:
        """For each subject the mask of the best box of its tag, that with the greatest overlap with the box asked for;
        None where there is none. (H, W) bool."""
        sink = io.BytesIO()
        image.save(sink, "PNG")
        tags = tuple(Tag(s.tag, (start, start + len(s.tag))) for s in subjects for start in [caption.index(s.tag)])
        samples = [
            Sample(row=0, image=sink.getvalue(), width=image.width, height=image.height, caption=caption, tags=tags)
        ]
        for stage in self._stages:
            samples = list(stage(samples))
        return [self._best(samples[0].candidates, subject, image) for subject in subjects]

    def _best(self, candidates: Sequence[Entity], subject: Subject, image: Image.Image) -> Mask | None:
        x1, y1, x2, y2 = _pixels(subject, image)
        named = [c for c in candidates if c.tag == subject.tag and c.mask is not None]
        if not named:
            return None
        xywh = [[c.box[0], c.box[1], c.box[2] - c.box[0], c.box[3] - c.box[1]] for c in named]
        overlaps = coco_mask.iou(np.array(xywh), np.array([[x1, y1, x2 - x1, y2 - y1]]), [0])[:, 0]
        best = max(range(len(named)), key=lambda i: (round(float(overlaps[i]), 2), named[i].score))
        rle = named[best].mask
        assert rle is not None
        mask: Mask = coco_mask.decode({"size": rle.size, "counts": rle.counts.encode()}).astype(bool)
        return mask if mask.any() else None


class Clip:
    """A whole CLIP, for pictures and for texts. Its embeddings are on the CPU."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        """Raises ModelError."""
        self._device = device
        try:
            self._model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            processor = CLIPImageProcessor.from_pretrained(folder)
        except UNLOADABLE as error:
            raise ModelError(f"CLIP {folder}: {first_line(error)}") from None
        self.side = int(self._model.config.vision_config.image_size)
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D) of length 1, of square pictures."""
        resized = [reference_tensor(p.resize((self.side, self.side), Image.Resampling.BICUBIC)) for p in pictures]
        pixels = (torch.stack(resized) / 255 - self._mean) / self._std
        return _unit(self._model.get_image_features(pixel_values=pixels.to(self._device)))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """(N, D) of length 1."""
        tokens = self._tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return _unit(self._model.get_text_features(**tokens.to(self._device)))


def score_subjects(
    subjects: Sequence[Subject], sample: Image.Image, caption: str, locate: Locator, clip: Clip
) -> list[SubjectScore]:
    """Every subject's reference against what the sample shows in its place."""
    scores = []
    for subject, mask in zip(subjects, locate(sample, caption, subjects), strict=True):
        asked = np.zeros((sample.height, sample.width), bool)
        x1, y1, x2, y2 = (round(v) for v in _pixels(subject, sample))
        asked[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = True
        reference_mask = subject.mask_array()
        assert reference_mask is not None
        reference = _Cut(subject.image, reference_mask)
        generated = _Cut(sample, asked if mask is None else mask)
        embeddings = clip.images([reference.picture, generated.picture])
        scores.append(
            SubjectScore(
                clip=float(embeddings[0] @ embeddings[1]),
                colour=float(np.abs(reference.quantiles() - generated.quantiles()).mean()),
                pattern=reference.pattern_distance(generated),
                found=float(mask is not None),
            )
        )
    return scores


class _Cut:
    """A subject cut out and centred, on white; and its colours, CIELAB."""

    def __init__(self, image: Image.Image, mask: Mask) -> None:
        self.picture = prepare_reference(image, mask, CANVAS_PX)
        silhouette = prepare_reference(Image.new("RGB", image.size), mask, CANVAS_PX)
        self._inside = np.asarray(silhouette.convert("L")) < 128
        self._lab = cv2.cvtColor(np.asarray(self.picture, np.float32) / 255, cv2.COLOR_RGB2LAB)

    def quantiles(self) -> Any:
        return np.quantile(self._lab[self._inside], QUANTILES, axis=0)

    def pattern_distance(self, other: _Cut) -> float:
        both = self._inside & other._inside
        if not both.any():
            return float(np.linalg.norm([100, 100, 100]))
        return float(np.linalg.norm(self._lab[both] - other._lab[both], axis=1).mean())


def _pixels(subject: Subject, image: Image.Image) -> list[float]:
    assert subject.box is not None
    return [v * side for v, side in zip(subject.box, image.size * 2, strict=True)]


def _unit(features: Any) -> Tensor:
    # transformers 5 wraps what 4 gave bare.
    found: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return functional.normalize(found, dim=-1).cpu()
