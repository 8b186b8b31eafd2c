"""Captioning: what the image shows, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from datapipe.backends.loading import ModelSettings, check_model, model_identity, pinned
from datapipe.backends.protocol import Captioner
from datapipe.schema import Reason, Sample, StageName, clean_text
from datapipe.stages.stage import Overlapping, SeesImages, StageSettings

ALT_TEXT_MODEL = "alt text"


class CaptionSettings(StageSettings, ModelSettings):
    """Who writes the captions."""

    key: ClassVar[str] = "caption.model"

    backend: Literal["transformers", "alt_text"] = "transformers"
    """transformers: an image-to-text model; alt_text: the text that came with the image."""
    model: str = "Salesforce/blip2-opt-2.7b"
    """Hub id or folder of BLIP, BLIP-2 or another image-to-text model. The paper: BLIP-2."""
    prompt: str = ""
    """With BLIP, BLIP-2 and GIT text that the caption continues, with all others what the caption answers. Default:
    nothing, or for a chat model "Describe the image in one sentence.", for PaliGemma "caption en", for InstructBLIP
    "A short image description.", for Florence-2 its task <CAPTION>."""
    max_new_tokens: int = Field(40, ge=1)
    """Maximum length of a caption, in tokens. Inferred."""
    num_beams: int = Field(1, ge=1)
    """Beams of the search; 1 is greedy. Inferred."""
    min_pixels: int = Field(256 * 28 * 28, ge=1)
    """A chat model's image is enlarged to at least this width × height. From Qwen2.5-VL's model card: 256 tokens."""
    max_pixels: int = Field(1280 * 28 * 28, ge=1)
    """A chat model's image is shrunk to at most this width × height, because memory and time grow with it. From
    Qwen2.5-VL's model card: 1,280 tokens."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> CaptionSettings:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")
        return self

    def build(self) -> CaptionStage:
        return CaptionStage(self)

    def check(self) -> None:
        if self.backend == "transformers":
            check_model(self, processor=True, tokenizer=True)

    def pinned(self) -> CaptionSettings:
        return pinned(self) if self.backend == "transformers" else self

    def model_used(self) -> str:
        return model_identity(self) if self.backend == "transformers" else self.backend


class CaptionStage(Overlapping, SeesImages):
    """Sets `caption` and `caption_model`."""

    name = StageName.CAPTION

    def __init__(self, settings: CaptionSettings) -> None:
        self.micro_batch = settings.images_at_once
        self._caption: Captioner | None = None
        self._model = ALT_TEXT_MODEL
        if settings.backend == "transformers":
            from datapipe.backends.image_to_text import ImageToText

            self._model = model_identity(settings)
            self._caption = ImageToText(
                settings,
                settings.prompt,
                settings.max_new_tokens,
                settings.num_beams,
                min_pixels=settings.min_pixels,
                max_pixels=settings.max_pixels,
            )

    def bucket(self, sample: Sample) -> object:
        return None  # Captioners resize every image to the same square.

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        if self._caption is None:
            captions = [" ".join(s.alt_text.split()) for s in samples]
        else:
            captions = self._caption([self.decode(s.image or b"") for s in samples])
        return [self._captioned(s, clean_text(c)) for s, c in zip(samples, captions, strict=True)]

    def _captioned(self, sample: Sample, caption: str) -> Sample:
        sample = sample.replace(caption=caption, caption_model=self._model)
        return sample if caption else sample.dropped(self.name, Reason.NO_CAPTION)
