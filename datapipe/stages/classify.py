"""Screening by a model: drops images that a classifier takes for unsafe, or for marked by their owner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from datapipe.backends.loading import ModelSettings, check_model, model_identity, pinned
from datapipe.backends.protocol import ImageClassifier
from datapipe.schema import Reason, Sample, StageName, decisive
from datapipe.stages.stage import Overlapping, SeesImages, StageSettings
from subject_diffusion.errors import BackendError


class ClassifierSettings(StageSettings, ModelSettings):
    """A classifier of images, and what it must not say of one."""

    stage: ClassVar[StageName]
    reason: ClassVar[Reason]

    labels: tuple[str, ...]
    """The model's labels, as its config.json has them, for which an image is dropped."""
    threshold: float = Field(0.5, gt=0, le=1)
    """Probability of any of these labels from which on an image is dropped. Inferred."""

    def build(self) -> ClassifyStage:
        return ClassifyStage(self)

    def check(self) -> None:
        check_model(self, processor=True)

    def pinned(self) -> ClassifierSettings:
        return pinned(self)

    def model_used(self) -> str:
        return model_identity(self)


class NsfwSettings(ClassifierSettings):
    """Which images are not safe for work."""

    key: ClassVar[str] = "nsfw.model"
    stage: ClassVar[StageName] = StageName.NSFW
    reason: ClassVar[Reason] = Reason.NSFW

    model: str
    """Hub id or folder of an image classifier, such as Falconsai/nsfw_image_detection."""
    labels: tuple[str, ...] = Field(("nsfw",), min_length=1)
    """The model's labels, as its config.json has them, for which an image is dropped."""


class WatermarkSettings(ClassifierSettings):
    """Which images bear a watermark."""

    key: ClassVar[str] = "watermark.model"
    stage: ClassVar[StageName] = StageName.WATERMARK
    reason: ClassVar[Reason] = Reason.WATERMARK

    model: str
    """Hub id or folder of an image classifier that was trained on watermarks."""
    labels: tuple[str, ...] = Field(("watermark",), min_length=1)
    """The model's labels, as its config.json has them, for which an image is dropped."""


class ClassifyStage(Overlapping, SeesImages):
    """Adds the probability to `scores`, under the stage's name."""

    def __init__(self, settings: ClassifierSettings) -> None:
        from datapipe.backends.image_classifier import HubClassifier

        self.name = settings.stage
        self.micro_batch = settings.images_at_once
        self._settings = settings
        self._classify: ImageClassifier = HubClassifier(settings)
        if missing := sorted(set(settings.labels) - set(self._classify.labels)):
            raise BackendError(
                f"{self.name.value}.labels: {', '.join(missing)} is none of {settings.model}'s labels, which are "
                f"{', '.join(self._classify.labels)}"
            )
        self._refused = [self._classify.labels.index(label) for label in settings.labels]

    def bucket(self, sample: Sample) -> object:
        return None  # Classifiers resize every image to the same square.

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        probabilities = self._classify([self.decode(s.image or b"") for s in samples])[:, self._refused]
        # Labels of which each image has one share a probability of 1; of others the largest is what is known of both.
        found = probabilities.max(axis=1) if self._classify.independent else probabilities.sum(axis=1)
        return [self._judged(s, min(float(p), 1.0)) for s, p in zip(samples, found, strict=True)]

    def _judged(self, sample: Sample, found: float) -> Sample:
        scores = dict(sample.scores) | {self.name.value: found}
        sample = sample.replace(scores=tuple(sorted(scores.items())))
        limit = self._settings.threshold
        if found < limit:
            return sample
        return sample.dropped(
            self.name, self._settings.reason, f"probability {decisive(found, limit)}, limit {limit:g}"
        )
