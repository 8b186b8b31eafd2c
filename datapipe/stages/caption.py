"""Captioning: what the image shows, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from datapipe.backends.chat import CHAT_PROMPT
from datapipe.backends.protocol import Unanswered
from datapipe.schema import Reason, Sample, StageName, clean_text
from datapipe.stages.captioner import CaptionerSettings, build_captioner
from datapipe.stages.stage import Overlapping, SeesImages

ALT_TEXT_MODEL = "alt text"


class CaptionSettings(CaptionerSettings):
    """Who writes the captions."""

    key: ClassVar[str] = "caption.model"

    def build(self) -> CaptionStage:
        return CaptionStage(self)


class CaptionStage(Overlapping, SeesImages):
    """Sets `caption` and `caption_model`."""

    name = StageName.CAPTION

    def __init__(self, settings: CaptionSettings) -> None:
        self.micro_batch = settings.images_at_once
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
        caption = clean_text(answer)
        sample = sample.replace(caption=caption, caption_model=self._model)
        return sample if caption else sample.dropped(self.name, Reason.NO_CAPTION)
