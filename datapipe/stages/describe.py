"""Description: each entity of a kept image in words, from its cutout alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np

from datapipe.backends.chat import DESCRIBE_PROMPT
from datapipe.backends.protocol import Pixels, Unanswered
from datapipe.schema import Entity, Reason, Sample, StageName, clean_text
from datapipe.stages.captioner import CaptionerSettings, build_captioner
from datapipe.stages.stage import Overlapping, SeesImages, SeesKept

_PAPER = 255
"""What is around a subject that is cut out: white."""


class DescribeSettings(CaptionerSettings):
    """Who describes the entities: any captioner. A model that also writes the captions in the same actor is loaded
    once."""

    key: ClassVar[str] = "describe.model"

    backend: Literal["transformers", "openai"] = "transformers"
    """As caption.backend."""
    model: str = "Salesforce/blip2-opt-2.7b"
    """As caption.model. The paper has no descriptions."""
    prompt: str = ""
    """As caption.prompt, about the cutout. Default: for a chat model "Describe the object in the image in one sentence:
    its kind, colors, material and shape."; for others as there."""

    def build(self) -> DescribeStage:
        return DescribeStage(self)


class DescribeStage(Overlapping, SeesImages, SeesKept):
    """Sets `desc` of the entities. A micro-batch goes to the captioner with all its entities."""

    name = StageName.DESCRIBE

    def __init__(self, settings: DescribeSettings) -> None:
        self.micro_batch = settings.images_at_once
        describe = build_captioner(settings, DESCRIBE_PROMPT)
        assert describe is not None, "there is no alt text of a cutout"
        self._describe = describe

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        cutouts: list[Pixels] = []
        for sample in samples:
            if sample.entities:
                image = self.decode(sample.image or b"")
                cutouts += [cutout(image, entity) for entity in sample.entities]
        answers = iter(self._describe(cutouts) if cutouts else ())
        return [self._described(s, answers) for s in samples]

    def _described(self, sample: Sample, answers: Iterator[str | Unanswered]) -> Sample:
        """Takes the answers about the sample's entities."""
        own = [next(answers) for _ in sample.entities]
        for answer in own:
            if isinstance(answer, Unanswered):
                return sample.failed(self.name, Reason.NO_ANSWER, answer.detail, answer.may_pass)
        words = iter(own)
        return sample.replace(
            candidates=tuple(
                c if c.rejected is not None else dataclasses.replace(c, desc=clean_text(str(next(words))) or None)
                for c in sample.candidates
            )
        )


def cutout(image: Pixels, entity: Entity) -> Pixels:
    """The part of the image in the entity's box, white outside of its mask; at least a pixel."""
    height, width = image.shape[:2]
    x1, y1 = (min(max(int(v), 0), side - 1) for v, side in zip(entity.box[:2], (width, height), strict=True))
    x2, y2 = (max(int(np.ceil(v)), start + 1) for v, start in zip(entity.box[2:], (x1, y1), strict=True))
    part = image[y1:y2, x1:x2]
    if entity.mask is None:
        return part
    return np.where(entity.mask.array()[y1:y2, x1:x2, None], part, np.uint8(_PAPER))
