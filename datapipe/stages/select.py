"""Selection: which candidate boxes become entities, by the paper's rules. Pure: no image and no model, so that
thresholds can
be changed later from the raw candidates alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pycocotools import mask as coco_mask
from pydantic import Field

from datapipe.schema import Entity, Reason, Rejection, Sample, StageName
from datapipe.settings import Settings


class SelectSettings(Settings):
    """Thresholds of the released code, in the order in which they are applied."""

    box_threshold: float = Field(0.25, ge=0, le=1)
    """Least score of a detection."""
    text_threshold: float = Field(0.2, ge=0, le=1)
    """Least mean probability of the tag's own tokens."""
    nms_iou: float = Field(0.5, ge=0, le=1)
    """Of two detections that overlap by more than this IoU the weaker one goes."""
    min_boxes: int = Field(2, ge=0)
    """An image with fewer detections is dropped."""
    max_boxes: int = Field(8, ge=1)
    """An image with more detections is dropped."""
    min_area: float = Field(0.08, ge=0, le=1)
    """Box area / image area must be above this."""
    max_area: float = Field(0.7, ge=0, le=1)
    """Box area / image area must be below this."""
    min_aspect: float = Field(0.3, gt=0)
    """Box width / height must be above this."""
    max_aspect: float = Field(3.0, gt=0)
    """Box width / height must be below this."""
    min_score: float = Field(0.3, ge=0, le=1)
    """An entity's score must be above this."""
    min_mask_fill: float = Field(0.6, ge=0, le=1)
    """Mask area / box area must be at least this."""
    max_containment: float = Field(0.8, ge=0, le=1)
    """Intersection / smaller area with a better entity must not be above this."""
    min_entities: int = Field(1, ge=1)
    """An image with fewer entities is dropped."""
    max_entities: int | None = Field(None, ge=1)
    """The best so many are kept; none: all."""


class SelectStage:
    """Gives every candidate its rejection or none, and every image its last verdict."""

    name = StageName.SELECT
    micro_batch = 64

    def __init__(self, settings: SelectSettings) -> None:
        self.settings = settings

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        return [self._select(s) for s in samples]

    def _select(self, sample: Sample) -> Sample:
        s = self.settings
        candidates = sorted(sample.candidates, key=lambda c: (-c.score, c.box, -c.text_score, c.span, c.tag))
        detected = _mark(candidates, self._detections(candidates))
        boxes = sum(c.rejected is None for c in detected)
        if boxes < s.min_boxes:
            return self._dropped(sample, detected, Reason.TOO_FEW_BOXES, f"{boxes} detections")
        if boxes > s.max_boxes:
            return self._dropped(sample, detected, Reason.TOO_MANY_BOXES, f"{boxes} detections")
        chosen = self._entities(sample, detected)
        entities = sum(c.rejected is None for c in chosen)
        if entities < s.min_entities:
            return self._dropped(sample, chosen, Reason.TOO_FEW_ENTITIES, f"{entities} of {boxes} detections")
        return sample.replace(candidates=tuple(chosen)).kept()

    def _dropped(self, sample: Sample, candidates: Sequence[Entity], reason: Reason, detail: str) -> Sample:
        return sample.replace(candidates=tuple(candidates)).dropped(self.name, reason, detail)

    def _detections(self, candidates: Sequence[Entity]) -> list[Rejection | None]:
        """The detector's own thresholds and NMS, candidates in descending order of score."""
        import torch
        from torchvision.ops import nms

        s = self.settings
        verdicts: list[Rejection | None] = [
            Rejection.SCORE
            if c.score <= s.box_threshold
            else Rejection.TEXT_SCORE
            if c.text_score <= s.text_threshold
            else None
            for c in candidates
        ]
        standing = [i for i, v in enumerate(verdicts) if v is None]
        if standing:
            boxes = torch.tensor([candidates[i].box for i in standing], dtype=torch.float64)
            # Scores may tie; the order is what counts.
            order = torch.arange(len(standing), 0, -1, dtype=torch.float64)
            best = {standing[i] for i in nms(boxes, order, s.nms_iou).tolist()}
            for i in standing:
                if i not in best:
                    verdicts[i] = Rejection.OVERLAPS_SAME_OBJECT
        return verdicts

    def _entities(self, sample: Sample, candidates: Sequence[Entity]) -> list[Entity]:
        kept: list[Entity] = []
        done: list[Entity] = []
        for candidate in candidates:
            if candidate.rejected is None:
                candidate = _with(candidate, self._objection(sample, candidate, kept))
            if candidate.rejected is None:
                kept.append(candidate)
            done.append(candidate)
        return done

    def _objection(self, sample: Sample, candidate: Entity, kept: Sequence[Entity]) -> Rejection | None:
        s = self.settings
        x1, y1, x2, y2 = candidate.box
        width, height = x2 - x1, y2 - y1
        if width <= 0 or height <= 0 or not s.min_area < width * height / (sample.width * sample.height) < s.max_area:
            return Rejection.AREA
        if not s.min_aspect < width / height < s.max_aspect:
            return Rejection.ASPECT
        if candidate.score <= s.min_score:
            return Rejection.SCORE
        start, end = candidate.span
        if not 0 <= start < end <= len(sample.caption):
            return Rejection.LABEL
        if candidate.mask is None or _mask_area(candidate) < s.min_mask_fill * width * height:
            return Rejection.MASK_FILL
        if any(_containment(candidate.box, k.box) > s.max_containment for k in kept):
            return Rejection.CONTAINED
        if s.max_entities is not None and len(kept) >= s.max_entities:
            return Rejection.SURPLUS
        return None


Box = tuple[float, float, float, float]


def _containment(a: Box, b: Box) -> float:
    """Intersection / smaller area of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0.0) * max(height, 0.0) / smaller if smaller > 0 else 1.0


def _mask_area(candidate: Entity) -> float:
    assert candidate.mask is not None
    return float(coco_mask.area({"size": list(candidate.mask.size), "counts": candidate.mask.counts.encode("ascii")}))


def _mark(candidates: Sequence[Entity], verdicts: Sequence[Rejection | None]) -> list[Entity]:
    return [_with(c, v) for c, v in zip(candidates, verdicts, strict=True)]


def _with(candidate: Entity, rejected: Rejection | None) -> Entity:
    return dataclasses.replace(candidate, rejected=rejected)
