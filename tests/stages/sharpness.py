"""A stage of a user's own: drops blurred images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from datapipe.decoding import decode_rgb
from datapipe.schema import Reason, Sample, StageName
from datapipe.stages.stage import StageSettings
from subject_diffusion.settings import EXECUTION_ONLY


class SharpnessSettings(StageSettings):
    """How sharp an image must be."""

    min_sharpness: float = Field(2.0, ge=0)
    """Minimum mean difference between neighboring pixels, of 255."""
    micro_batch: Annotated[int, EXECUTION_ONLY] = Field(16, ge=1)
    """Images per call."""

    def build(self) -> Sharpness:
        return Sharpness(self)


class Sharpness:
    """Drops images below the minimum."""

    name = StageName.CUSTOM

    def __init__(self, settings: SharpnessSettings) -> None:
        self.settings = settings
        self.micro_batch = settings.micro_batch

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        return [self._judged(s, sharpness(s.image or b"")) for s in samples]

    def _judged(self, sample: Sample, found: float) -> Sample:
        if found >= self.settings.min_sharpness:
            return sample
        return sample.dropped(self.name, Reason.CUSTOM, f"blurred: sharpness {found:.2f}")


def sharpness(image: bytes) -> float:
    pixels = decode_rgb(image).astype(np.float64)
    return float(np.abs(np.diff(pixels, axis=1)).mean())
