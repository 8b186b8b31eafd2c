"""Grounding: a box for every place in the image that one of the caption's nouns names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from datapipe.backends.loading import ModelSettings, check_checkpoint, check_model, fetch_from_hub, locate
from datapipe.errors import BackendError
from datapipe.images import decode_rgb
from datapipe.schema import Entity, Reason, Sample, StageName

if TYPE_CHECKING:
    from datapipe.backends.grounding_dino import Detection, OriginalGroundingDino, TransformersGroundingDino


class GroundSettings(ModelSettings):
    """The detector, and what of its output is recorded. Thresholds that decide are in `select`."""

    backend: Literal["transformers", "groundingdino"] = "transformers"
    """transformers: folders and hub ids; groundingdino: original checkpoints, through groundingdino-py."""
    model: str = "IDEA-Research/grounding-dino-tiny"
    """Hub id or folder; for groundingdino a .pth file. The default is Swin-T OGC, as in the released code."""
    config: Literal["swint_ogc", "swinb"] = "swint_ogc"
    """For groundingdino: which of the published models the checkpoint is."""
    text_encoder: str = "bert-base-uncased"
    """For groundingdino: bert-base-uncased, from the hub or in a folder; its text encoder and tokenizer."""
    short_side: int = Field(800, ge=32)
    """Images are resized to this short side, pixels. Released code."""
    long_side: int = Field(3000, ge=32)
    """But to no longer side than this, pixels. Released code."""
    floor: float = Field(0.2, ge=0, le=1)
    """Boxes that score above this are recorded as candidates, so that thresholds can be raised later without a GPU."""
    max_candidates: int = Field(50, ge=1)
    """Of these at most so many, the best."""
    min_boxes: int = Field(2, ge=0)
    """An image with fewer candidates is dropped here, before it costs a segmentation. Released code: 2 detections."""

    @model_validator(mode="after")
    def _precision_that_the_backend_has(self) -> GroundSettings:
        if self.backend == "groundingdino" and self.dtype != "float32":
            raise ValueError(
                f"groundingdino-py computes in float32 only, not {self.dtype}; or set backend=transformers"
            )
        return self


class GroundStage:
    """Sets `candidates`, with tag, span, box and scores."""

    name = StageName.GROUND

    def __init__(self, settings: GroundSettings) -> None:
        from datapipe.backends.grounding_dino import OriginalGroundingDino, TransformersGroundingDino

        self.settings = s = settings
        self.micro_batch = s.micro_batch
        self._detect: TransformersGroundingDino | OriginalGroundingDino
        if s.backend == "transformers":
            self._detect = TransformersGroundingDino(s, s.short_side, s.long_side, s.floor, s.max_candidates)
        else:
            self._detect = OriginalGroundingDino(
                s, s.text_encoder, s.config, s.short_side, s.long_side, s.floor, s.max_candidates
            )

    def bucket(self, sample: Sample) -> object:
        return self._detect.padded_size(sample.height, sample.width)

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        images = [decode_rgb(s.image or b"") for s in samples]
        nouns = [list(dict.fromkeys(t.text for t in s.tags)) for s in samples]
        found = self._detect(images, nouns)
        return [self._grounded(s, n, d) for s, n, d in zip(samples, nouns, found, strict=True)]

    def _grounded(self, sample: Sample, nouns: Sequence[str], detections: Sequence[Detection]) -> Sample:
        candidates = []
        seen = dict.fromkeys(nouns, 0)
        for d in detections:
            noun = nouns[d.phrase]
            # A noun mentioned several times lends its mentions to its boxes in turn, best box first.
            mentions = [t.span for t in sample.tags if t.text == noun]
            span = mentions[seen[noun] % len(mentions)]
            seen[noun] += 1
            candidates.append(Entity(noun, span, d.box, d.score, d.text_score))
        sample = sample.replace(candidates=tuple(candidates))
        if len(candidates) < self.settings.min_boxes:
            return sample.dropped(
                self.name, Reason.TOO_FEW_BOXES, f"{len(candidates)} boxes above {self.settings.floor:g}"
            )
        return sample


def check(settings: GroundSettings) -> None:
    """Raises BackendError when the detector cannot be had."""
    if settings.backend == "transformers":
        check_model(settings, "ground.model")
        return
    check_checkpoint(settings, "ground.model")
    text, key = ModelSettings(model=settings.text_encoder), "ground.text_encoder"
    if Path(locate(text)).exists():
        check_model(text, key)
    elif settings.text_encoder == "bert-base-uncased":
        fetch_from_hub(text, key, "config.json")
    else:
        raise BackendError(f"{key} {settings.text_encoder}: no such folder; give one, or bert-base-uncased")
