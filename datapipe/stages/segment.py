"""Segmentation: a mask for every candidate box. Masks may overlap; none overwrites another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from datapipe.backends.loading import CompilableSettings, check_checkpoint, check_model, model_identity, pinned
from datapipe.backends.segmenters import SEGMENTERS
from datapipe.schema import Sample, StageName
from datapipe.stages.stage import Compilable, Overlapping, SeesImages, StageSettings

if TYPE_CHECKING:
    from datapipe.backends.sam import OriginalSam, TransformersSam


class SegmentSettings(StageSettings, CompilableSettings):
    """The segmenter."""

    key: ClassVar[str] = "segment.model"

    backend: Literal["transformers", "segment_anything", "grounded"] = "transformers"
    """transformers: folders and hub ids of SAM, SAM-HQ, SAM 2, SAM 2.1 or EdgeTAM; segment_anything: original
    checkpoints; grounded: no model, for the masks that ground.backend=sam3 gives with its boxes."""
    model: str = "facebook/sam-vit-huge"
    """Hub id or folder; for segment_anything a .pth file. Released code: SAM ViT-H."""
    architecture: Literal["vit_h", "vit_l", "vit_b"] = "vit_h"
    """For segment_anything: which of the published models the checkpoint is."""

    def build(self) -> SegmentStage:
        return SegmentStage(self)

    def check(self) -> None:
        if self.backend == "segment_anything":
            check_checkpoint(self)
        elif self.backend == "transformers":
            check_model(self, kinds=SEGMENTERS)

    def pinned(self) -> SegmentSettings:
        return pinned(self) if self.backend == "transformers" else self

    @property
    def computes_here(self) -> bool:
        return self.backend != "grounded"

    def model_used(self) -> str:
        return self.backend if self.backend == "grounded" else model_identity(self)


class SegmentStage(Overlapping, SeesImages, Compilable):
    """Gives every candidate its mask, predicted IoU and stability. SAM gets the RGB image; the released code gave it a
    normalized one."""

    name = StageName.SEGMENT

    def __init__(self, settings: SegmentSettings) -> None:
        self.micro_batch = settings.images_at_once
        self._segment = _segmenter(settings)
        if settings.compile is True:
            self.compile()

    def compile(self) -> None:
        if self._segment is not None:
            self._segment.compile()

    def bucket(self, sample: Sample) -> object:
        return None  # Every image fills the same square.

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        if self._segment is None:
            return list(samples)
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


def _segmenter(settings: SegmentSettings) -> TransformersSam | OriginalSam | None:
    if settings.backend == "grounded":
        return None
    from datapipe.backends.sam import OriginalSam, TransformersSam

    if settings.backend == "transformers":
        return TransformersSam(settings)
    return OriginalSam(settings, settings.architecture)
