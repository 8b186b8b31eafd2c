"""Grounding: boxes in the image for the nouns of its caption."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from datapipe.backends.loading import (
    ModelSettings,
    TextEncoderSettings,
    check_checkpoint,
    check_model,
    model_identity,
    pinned,
)
from datapipe.backends.protocol import Detection, Grounder, Grounding
from datapipe.schema import Entity, Reason, Sample, StageName
from datapipe.stages.stage import Overlapping, SeesImages, StageSettings


class GroundSettings(StageSettings, ModelSettings):
    """The detector, and how much of its output is recorded. The thresholds that decide are in `select`."""

    key: ClassVar[str] = "ground.model"

    backend: Literal["transformers", "groundingdino", "sam3"] = "transformers"
    """transformers: folders and hub ids; groundingdino: original checkpoints, through groundingdino-py; sam3: SAM 3 or
    its LiteText variant, which gives masks with the boxes (see segment.backend)."""
    model: str = "IDEA-Research/grounding-dino-tiny"
    """Hub id or folder of Grounding DINO, MM-Grounding-DINO or LLMDet; for groundingdino a .pth file. The default is
    Swin-T OGC, as in the released code. With sam3, facebook/sam3, which is gated."""
    config: Literal["swint_ogc", "swinb"] = "swint_ogc"
    """For groundingdino: which of the published models the checkpoint is."""
    text_encoder: str = "bert-base-uncased"
    """For groundingdino: its text encoder and tokenizer; bert-base-uncased, from the hub or in a folder."""
    short_side: int = Field(800, ge=32)
    """Images are resized so that their shorter side has this many pixels. Released code."""
    long_side: int = Field(3000, ge=32)
    """Maximum longer side after resizing, in pixels. Released code."""
    pad_multiple: int = Field(1, ge=1)
    """Resized images are padded to a multiple of this many pixels, so that more of them share a batch. Padding moves
    boxes, because the image encoder sees it; manifests/recipes/README.md says by how much. Released code: 1, no
    padding."""
    separator: Literal["period", "comma"] = "period"
    """How nouns are joined into one prompt. period: "mug . fish .", as the model was trained, each noun for itself;
    comma: "mug,fish.", where nouns see each other, and one that the caption repeats is asked for repeatedly (released
    code)."""
    floor: float = Field(0.2, ge=0, le=1)
    """Boxes with a higher score are recorded as candidates, so that thresholds can be raised later without a GPU."""
    max_candidates: int = Field(50, ge=1)
    """Maximum candidates per image; the best are recorded."""
    min_boxes: int = Field(2, ge=0)
    """An image with fewer candidates is dropped before it costs a segmentation. Released code: 2 detections."""

    @model_validator(mode="after")
    def _precision_that_the_backend_has(self) -> GroundSettings:
        if self.backend == "groundingdino" and self.dtype != "float32":
            raise ValueError(
                f"groundingdino-py computes in float32 only, not {self.dtype}; or set backend=transformers"
            )
        return self

    def build(self) -> GroundStage:
        return GroundStage(self)

    def check(self) -> None:
        if self.backend == "transformers":
            check_model(self, kinds=("grounding-dino", "mm-grounding-dino"), tokenizer=True)
        elif self.backend == "sam3":
            check_model(self, kinds=("sam3", "sam3_video", "sam3_lite_text"), tokenizer=True)
        else:
            check_checkpoint(self)
            check_model(TextEncoderSettings(model=self.text_encoder), kinds=("bert",), tokenizer=True)

    def pinned(self) -> GroundSettings:
        return self if self.backend == "groundingdino" else pinned(self)

    def model_used(self) -> str:
        if self.backend != "groundingdino":
            return model_identity(self)
        return f"{model_identity(self)} {model_identity(pinned(TextEncoderSettings(model=self.text_encoder)))}"


class GroundStage(Overlapping, SeesImages):
    """Sets `candidates`, with tag, box, scores, and the span of the tag's first mention, and marks the tags for which
    the prompt had no room."""

    name = StageName.GROUND

    def __init__(self, settings: GroundSettings) -> None:
        self.settings = settings
        self.micro_batch = settings.images_at_once
        self._detect = _detector(settings)

    def bucket(self, sample: Sample) -> object:
        return self._detect.padded_size(sample.height, sample.width)

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        images = [self.decode(s.image or b"") for s in samples]
        nouns = [self._nouns(s) for s in samples]
        found = self._detect(images, nouns)
        return [self._grounded(s, n, g) for s, n, g in zip(samples, nouns, found, strict=True)]

    def _nouns(self, sample: Sample) -> list[str]:
        mentions = [t.text for t in sample.tags]
        repeats = self.settings.separator == "comma" and self.settings.backend != "sam3"
        return mentions if repeats else list(dict.fromkeys(mentions))

    def _grounded(self, sample: Sample, nouns: Sequence[str], found: Grounding) -> Sample:
        first = {t.text: t.span for t in reversed(sample.tags)}
        candidates = tuple(_candidate(nouns[d.phrase], first[nouns[d.phrase]], d) for d in found.detections)
        asked = {noun for i, noun in enumerate(nouns) if i not in found.left_out}
        tags = tuple(dataclasses.replace(t, left_out=t.text not in asked) for t in sample.tags)
        sample = sample.replace(candidates=candidates, tags=tags)
        if len(candidates) < self.settings.min_boxes:
            return sample.dropped(
                self.name, Reason.TOO_FEW_BOXES, f"{len(candidates)} boxes above {self.settings.floor:g}"
            )
        return sample


def _detector(s: GroundSettings) -> Grounder:
    if s.backend == "sam3":
        from datapipe.backends.sam3 import Sam3

        return Sam3(s, s.floor, s.max_candidates)
    from datapipe.backends.grounding_dino import Asking, OriginalGroundingDino, TransformersGroundingDino

    asking = Asking(s.short_side, s.long_side, s.pad_multiple, s.separator, s.floor, s.max_candidates)
    if s.backend == "transformers":
        return TransformersGroundingDino(s, asking)
    return OriginalGroundingDino(s, asking, s.text_encoder, s.config)


def _candidate(noun: str, span: tuple[int, int], found: Detection) -> Entity:
    entity = Entity(noun, span, found.box, found.score, found.text_score, rival_score=found.rival_score)
    if (segment := found.segment) is None:
        return entity
    return dataclasses.replace(
        entity, mask=segment.mask, predicted_iou=segment.predicted_iou, stability=segment.stability
    )
