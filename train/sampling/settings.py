"""What a sampling can be told beside its prompt and subjects."""

from __future__ import annotations

from pydantic import Field

from model.interpolation import Interpolation
from train.trainer.recipe import GuidanceSettings

Axis = tuple[str, tuple[float, ...]]
"""A setting, and the values of it that a grid shows."""
MAX_SEED = 2**63 - 1


class SamplingSettings(GuidanceSettings):
    """How a picture is drawn."""

    subject_scale: float = Field(1.0, ge=0, le=1)
    """How strongly the adapters let the references' details in: `SubjectDiffusionPipeline.set_subject_scale`."""
    alpha: float = Field(0.0, ge=0, le=1)
    """How much the base model draws, without the subjects: text-image interpolation. 1: all."""
    interpolation: Interpolation = "blend"
    """blend: of every step's prediction, the share `alpha` is the base's; switch: the base draws that share of the
    steps, the last ones, alone. Paper: switch."""
