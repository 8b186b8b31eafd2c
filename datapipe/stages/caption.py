"""Captioning: what is in the picture, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from datapipe.backends.loading import ModelSettings, check_model, identity
from datapipe.images import decode_rgb
from datapipe.schema import Reason, Sample, StageName, clean_text

ALT_TEXT_MODEL = "alt text"


class CaptionSettings(ModelSettings):
    """Who writes the captions."""

    backend: Literal["transformers", "alt_text"] = "transformers"
    """transformers: an image-to-text model; alt_text: the text that came with the image."""
    model: str = "Salesforce/blip2-opt-2.7b"
    """Hub id or folder of BLIP, BLIP-2 or another image-to-text model. The paper: BLIP-2."""
    prompt: str = ""
    """Text that the caption continues; for a model that chats, what it is asked."""
    max_new_tokens: int = Field(40, ge=1)
    """Longest caption, tokens. Inferred."""
    num_beams: int = Field(1, ge=1)
    """Beams of the search; 1 is greedy. Inferred."""


class CaptionStage:
    """Sets `caption` and `caption_model`."""

    name = StageName.CAPTION

    def __init__(self, settings: CaptionSettings) -> None:
        self.micro_batch = settings.micro_batch
        self._backend = None
        self._model = ALT_TEXT_MODEL
        if settings.backend == "transformers":
            from datapipe.backends.image_to_text import ImageToText

            self._model = identity(settings)
            self._backend = ImageToText(settings, settings.prompt, settings.max_new_tokens, settings.num_beams)

    def bucket(self, sample: Sample) -> object:
        return None  # captioners resize every image to one square

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        if self._backend is None:
            captions = [" ".join(s.alt_text.split()) for s in samples]
        else:
            captions = self._backend([decode_rgb(s.image or b"") for s in samples])
        return [self._captioned(s, clean_text(c)) for s, c in zip(samples, captions, strict=True)]

    def _captioned(self, sample: Sample, caption: str) -> Sample:
        sample = sample.replace(caption=caption, caption_model=self._model)
        return sample if caption else sample.dropped(self.name, Reason.NO_CAPTION)


def check(settings: CaptionSettings) -> None:
    """Raises BackendError when the captioner cannot be had."""
    if settings.backend == "transformers":
        check_model(settings, "caption.model")
