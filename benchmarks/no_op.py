"""Stages that do nothing, so that what is left of a run's time is the engine's own. A module by itself, because workers
import it."""

from __future__ import annotations

from collections.abc import Sequence

from datapipe.recipe import Recipe
from datapipe.schema import Sample, StageName
from datapipe.stages.stage import StageSettings


class NoOp:
    """Passes every sample on, the last stage as kept; as many at once as a model without a GPU gets."""

    micro_batch = 8

    def __init__(self, name: StageName) -> None:
        self.name = name

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        return [sample.kept() for sample in samples] if self.name is StageName.SELECT else list(samples)


class NoOpSettings(StageSettings):
    """The block of a stage that does nothing."""

    stage: StageName
    """Whose place it takes."""

    def build(self) -> NoOp:
        return NoOp(self.stage)


class NoOpRecipe(Recipe):
    """A recipe of which no stage does anything."""

    def stages(self) -> dict[StageName, StageSettings]:
        return {name: NoOpSettings(stage=name) for name in super().stages()}
