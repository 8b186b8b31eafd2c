"""Segmentation: a mask for every candidate box. Masks may overlap; none overwrites another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from datapipe.backends.loading import CompilableSettings, check_checkpoint, check_model, model_identity, pinned
from datapipe.backends.segmenters import SEGMENTERS
from datapipe.schema import Sample, StageName
from datapipe.stages.stage import Compilable, Overlapping, SeesImages, StageSettings


class SegmentSettings(StageSettings, CompilableSettings):
    """The segmenter."""

    key: ClassVar[str] = "segment.model"

    backend: Literal["transformers", "segment_anything"] = "transformers"
    """transformers: folders and hub ids of SAM, SAM-HQ, SAM 2, SAM 2.1 or EdgeTAM; segment_anything: original
    checkpoints."""
    model: str = "facebook/sam-vit-huge"
    """Hub id or folder; for segment_anything a .pth file. Released code: SAM ViT-H."""
    architecture: Literal["vit_h", "vit_l", "vit_b"] = "vit_h"
    """For segment_anything: which of the published models the checkpoint is."""

    def build(self) -> SegmentStage:
        return SegmentStage(self)

    def check(self) -> None:
        if self.backend == "segment_anything":
            check_checkpoint(self)
        else:
            check_model(self, kinds=SEGMENTERS)

    def pinned(self) -> SegmentSettings:
        return pinned(self) if self.backend == "transformers" else self

    def model_used(self) -> str:
        return model_identity(self)


class SegmentStage(Overlapping, SeesImages, Compilable):
    """Gives every candidate its mask, predicted IoU and stability. SAM gets the RGB image; the released code gave it a
    normalized one."""

    name = StageName.SEGMENT

    def __init__(self, settings: SegmentSettings) -> None:
        from datapipe.backends.sam import OriginalSam, TransformersSam

        self.micro_batch = settings.images_at_once
        self._segment = (
            TransformersSam(settings)
            if settings.backend == "transformers"
            else OriginalSam(settings, settings.architecture)
        )
        if settings.compile is True:
            self.compile()

    def compile(self) -> None:
        self._segment.compile()

    def bucket(self, sample: Sample) -> object:
        return None  # Every image fills the same square.

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        images = [self.decode(s.image or b"") for s in samples]
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
