"""Segmenting: a mask for every candidate box. Masks may overlap; none overwrites another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from datapipe.backends.loading import ModelSettings, check_checkpoint, check_model
from datapipe.images import decode_rgb
from datapipe.schema import Sample, StageName

if TYPE_CHECKING:
    from datapipe.backends.sam import OriginalSam, TransformersSam


class SegmentSettings(ModelSettings):
    """The segmenter."""

    backend: Literal["transformers", "segment_anything"] = "transformers"
    """transformers: folders and hub ids, of SAM or SAM 2; segment_anything: original checkpoints."""
    model: str = "facebook/sam-vit-huge"
    """Hub id or folder; for segment_anything a .pth file. Released code: SAM ViT-H."""
    architecture: Literal["vit_h", "vit_l", "vit_b"] = "vit_h"
    """For segment_anything: which of the published models the checkpoint is."""


class SegmentStage:
    """Gives every candidate its mask, predicted IoU and stability. SAM sees the RGB image; the released code gave it
    a normalised one."""

    name = StageName.SEGMENT

    def __init__(self, settings: SegmentSettings) -> None:
        from datapipe.backends.sam import OriginalSam, TransformersSam

        self.micro_batch = settings.micro_batch
        self._segment: TransformersSam | OriginalSam
        if settings.backend == "transformers":
            self._segment = TransformersSam(settings)
        else:
            self._segment = OriginalSam(settings, settings.architecture)

    def bucket(self, sample: Sample) -> object:
        return None  # every image fills the same square

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        images = [decode_rgb(s.image or b"") for s in samples]
        segments = self._segment(images, [[c.box for c in s.candidates] for s in samples])
        return [
            s.replace(
                candidates=tuple(
                    dataclasses.replace(c, mask=m.mask, predicted_iou=m.predicted_iou, stability=m.stability)
                    for c, m in zip(s.candidates, found, strict=True)
                )
            )
            for s, found in zip(samples, segments, strict=True)
        ]


def check(settings: SegmentSettings) -> None:
    """Raises BackendError when the segmenter cannot be had."""
    if settings.backend == "segment_anything":
        check_checkpoint(settings, "segment.model")
    else:
        check_model(settings, "segment.model")
