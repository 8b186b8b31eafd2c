"""Captioning: what the image shows, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from pydantic import model_validator

from datapipe.backends.chat import CHAT_PROMPT, OBJECTS_PROMPT, OBJECTS_SCHEMA, caption_and_objects
from datapipe.backends.protocol import Unanswered
from datapipe.schema import Reason, Sample, StageName, clean_text
from datapipe.stages.captioner import CaptionerSettings, build_captioner
from datapipe.stages.stage import Overlapping, SeesImages
from subject_diffusion.errors import one_line
from subject_diffusion.settings import ADDED_LATER

ALT_TEXT_MODEL = "alt text"


class CaptionSettings(CaptionerSettings):
    """Who writes the captions."""

    key: ClassVar[str] = "caption.model"

    objects: Annotated[bool, ADDED_LATER] = False
    """A chat model lists the objects of its caption, too, which tag.backend=caption makes the tags. It is asked for
    JSON, and a server made to give it; leave room for that in max_new_tokens."""

    @model_validator(mode="after")
    def _objects_of_who_is_asked(self) -> Self:
        if self.objects and self.backend == "alt_text":
            raise ValueError("objects: alt_text is no model that could list them")
        return self

    def build(self) -> CaptionStage:
        return CaptionStage(self)


class CaptionStage(Overlapping, SeesImages):
    """Sets `caption` and `caption_model`, and `tags` where the captioner lists the objects."""

    name = StageName.CAPTION

    def __init__(self, settings: CaptionSettings) -> None:
        self.micro_batch = settings.images_at_once
        self._objects = settings.objects
        if settings.objects:
            prompt = f"{settings.prompt or CHAT_PROMPT} {OBJECTS_PROMPT}"
            self._caption = build_captioner(settings.model_copy(update={"prompt": prompt}), prompt, OBJECTS_SCHEMA)
        else:
            self._caption = build_captioner(settings, CHAT_PROMPT)
        self._model = ALT_TEXT_MODEL if self._caption is None else settings.model_used()

    def bucket(self, sample: Sample) -> object:
        return None  # Captioners resize every image to the same square.

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        captions: Sequence[str | Unanswered]
        if self._caption is None:
            captions = [" ".join(s.alt_text.split()) for s in samples]
        else:
            captions = self._caption([self.decode(s.image or b"") for s in samples])
        return [self._captioned(s, c) for s, c in zip(samples, captions, strict=True)]

    def _captioned(self, sample: Sample, answer: str | Unanswered) -> Sample:
        if isinstance(answer, Unanswered):
            return sample.failed(self.name, Reason.NO_ANSWER, answer.detail, answer.may_pass)
        if self._objects:
            try:
                caption, tags = caption_and_objects(answer)
            except ValueError as error:
                why = f"its answer is not the JSON that it was asked for: {one_line(error)}: {answer}"
                return sample.failed(self.name, Reason.NO_ANSWER, why[:200])
        else:
            caption, tags = clean_text(answer), sample.tags
        sample = sample.replace(caption=caption, caption_model=self._model, tags=tags)
        return sample if caption else sample.dropped(self.name, Reason.NO_CAPTION)
