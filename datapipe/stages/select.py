"""Selection: which candidate boxes become entities, by the paper's rules. It needs neither image nor model, so that
thresholds can be changed later with nothing but the recorded candidates."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from datapipe.schema import Entity, Reason, Rejection, Sample, StageName
from datapipe.stages.number_words import with_number_words, without_number_words
from datapipe.stages.stage import StageSettings


class SelectSettings(StageSettings):
    """Thresholds of the released code, in the order in which they are applied."""

    score: Literal["paper", "phrase"] = "phrase"
    """Which score the thresholds are for and the order goes by. paper: the best probability of any noun's token, which
    may be a piece of a long word or another noun's (released code); phrase: the mean over the tag's own tokens. Both
    are recorded."""
    box_threshold: float = Field(0.25, ge=0, le=1)
    """A detection's score must be above this."""
    text_threshold: float = Field(0.2, ge=0, le=1)
    """The mean probability of the tag's own tokens must be above this."""
    nms_iou: float = Field(0.5, ge=0, le=1)
    """When two detections overlap by more than this IoU, the weaker one is discarded."""
    count_boxes: Literal["before_nms", "after_nms"] = "after_nms"
    """Which detections min_boxes and max_boxes count. before_nms: several boxes of one object count as several
    (released code)."""
    min_boxes: int = Field(2, ge=0)
    """An image with fewer detections is dropped."""
    max_boxes: int = Field(8, ge=1)
    """An image with more detections is dropped."""
    number_words: bool = False
    """Put the number of a noun's detections, "two" to "six", into the caption before the noun's first mention. Released
    code: on, and with "two dogs" the caption then says "two two dogs"."""
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
    score_digits: int | None = Field(None, ge=1)
    """Digits after the point to which a score is cut before it is compared with min_score. Default: not cut. Released
    code: 2, so that 0.309 is not above 0.3."""
    max_rival_score: float | None = Field(None, ge=0, le=1)
    """The best probability of another noun's token must not be above this. Default: no maximum. Released code: 0.2,
    its text threshold, above which the other noun becomes part of the label, and labels of two words are dropped."""
    max_masks_in_box: int | None = Field(None, ge=1)
    """Maximum number of detections whose mask reaches into the box, its own included. Default: no maximum. Released
    code: 4."""
    min_mask_fill: float = Field(0.6, ge=0, le=1)
    """Area of the mask inside its box / box area must be at least this."""
    max_mask_area: float | None = Field(1.0, gt=0)
    """Area of the whole mask / box area must not be above this; null: no maximum. Released code: 1."""
    max_containment: float = Field(0.8, ge=0, le=1)
    """Intersection / smaller area with a better entity must not be above this."""
    min_entities: int = Field(1, ge=1)
    """An image with fewer entities is dropped."""
    max_entities: int | None = Field(None, ge=1)
    """Maximum entities per image; the best are kept. Default: no maximum."""

    def build(self) -> SelectStage:
        return SelectStage(self)


class SelectStage:
    """Decides for every candidate whether it is rejected and why, and gives every image its last verdict."""

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
        sample = without_number_words(sample)
        candidates = sorted(
            sample.candidates, key=lambda c: (-self._score(c), c.box, -c.score, -c.text_score, c.tag, c.span)
        )
        detected = _with_mentions(_mark(candidates, self._detections(candidates)), sample)
        counted = (None, Rejection.OVERLAPS_SAME_OBJECT) if s.count_boxes == "before_nms" else (None,)
        boxes = sum(c.rejected in counted for c in detected)
        if boxes < s.min_boxes:
            return self._dropped(sample, detected, Reason.TOO_FEW_BOXES, f"{boxes} detections")
        if boxes > s.max_boxes:
            return self._dropped(sample, detected, Reason.TOO_MANY_BOXES, f"{boxes} detections")
        if s.number_words:
            sample = with_number_words(sample.replace(candidates=tuple(detected)))
            detected = list(sample.candidates)
        chosen = self._entities(sample, detected)
        entities = sum(c.rejected is None for c in chosen)
        if entities < s.min_entities:
            return self._dropped(sample, chosen, Reason.TOO_FEW_ENTITIES, f"{entities} of {boxes} detections")
        return sample.replace(candidates=tuple(chosen)).kept()

    def _score(self, candidate: Entity) -> float:
        return candidate.score if self.settings.score == "paper" else candidate.text_score

    def _dropped(self, sample: Sample, candidates: Sequence[Entity], reason: Reason, detail: str) -> Sample:
        return sample.replace(candidates=tuple(candidates)).dropped(self.name, reason, detail)

    def _detections(self, candidates: Sequence[Entity]) -> list[Rejection | None]:
        """The detector's own thresholds and NMS, for candidates in descending order of the score that counts."""
        s = self.settings
        verdicts: list[Rejection | None] = [
            Rejection.SCORE
            if self._score(c) <= s.box_threshold
            else Rejection.TEXT_SCORE
            if c.text_score <= s.text_threshold
            else None
            for c in candidates
        ]
        standing = [i for i, v in enumerate(verdicts) if v is None]
        best: list[int] = []
        for i in standing:
            if any(box_iou(candidates[i].box, candidates[b].box) > s.nms_iou for b in best):
                verdicts[i] = Rejection.OVERLAPS_SAME_OBJECT
            else:
                best.append(i)
        return verdicts

    def _entities(self, sample: Sample, candidates: Sequence[Entity]) -> list[Entity]:
        detections = [c for c in candidates if c.rejected is None]
        kept: list[Entity] = []
        done: list[Entity] = []
        for candidate in candidates:
            if candidate.rejected is None:
                objection = self._box_objection(sample, candidate) or self._mask_objection(candidate, detections)
                candidate = _with(candidate, objection or self._objection_beside(candidate, kept))
            if candidate.rejected is None:
                kept.append(candidate)
            done.append(candidate)
        return done

    def _box_objection(self, sample: Sample, candidate: Entity) -> Rejection | None:
        s = self.settings
        x1, y1, x2, y2 = candidate.box
        width, height = x2 - x1, y2 - y1
        if width <= 0 or height <= 0 or not s.min_area < width * height / (sample.width * sample.height) < s.max_area:
            return Rejection.AREA
        if not s.min_aspect < width / height < s.max_aspect:
            return Rejection.ASPECT
        if cut_score(self._score(candidate), s.score_digits) <= s.min_score:
            return Rejection.SCORE
        start, end = candidate.span
        if not 0 <= start < end <= len(sample.caption):
            return Rejection.LABEL
        if s.max_rival_score is not None and (candidate.rival_score or 0.0) > s.max_rival_score:
            return Rejection.RIVAL
        return None

    def _mask_objection(self, candidate: Entity, detections: Sequence[Entity]) -> Rejection | None:
        s = self.settings
        x1, y1, x2, y2 = candidate.box
        area = (x2 - x1) * (y2 - y1)
        if s.max_masks_in_box is not None:
            inside = sum(d.mask is not None and d.mask.area_within(candidate.box) > 0 for d in detections)
            if inside > s.max_masks_in_box:
                return Rejection.CROWDED
        if candidate.mask is None or candidate.mask.area_within(candidate.box) < s.min_mask_fill * area:
            return Rejection.MASK_FILL
        if s.max_mask_area is not None and candidate.mask.area > s.max_mask_area * area:
            return Rejection.MASK_SIZE
        return None

    def _objection_beside(self, candidate: Entity, kept: Sequence[Entity]) -> Rejection | None:
        s = self.settings
        if any(_containment(candidate.box, k.box) > s.max_containment for k in kept):
            return Rejection.CONTAINED
        if s.max_entities is not None and len(kept) >= s.max_entities:
            return Rejection.SURPLUS
        return None


Box = tuple[float, float, float, float]


def box_iou(a: Box, b: Box) -> float:
    """Intersection / union of two boxes, in the order of torchvision's operations: a threshold is met or not to the
    last bit."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def _containment(a: Box, b: Box) -> float:
    """Intersection / smaller area of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0.0) * max(height, 0.0) / smaller if smaller > 0 else 1.0


def cut_score(score: float, digits: int | None) -> float:
    """0.309 cut to two digits is 0.3."""
    return score if digits is None else float(f"{score:.6f}"[: 2 + digits])


def _with_mentions(candidates: Sequence[Entity], sample: Sample) -> list[Entity]:
    """A noun that the caption mentions several times gives each of its detections a mention in turn, the best first.
    What overlaps a better box must not take one away."""
    seen: Counter[str] = Counter()
    done = []
    for candidate in candidates:
        mentions = [t.span for t in sample.tags if t.text == candidate.tag] or [candidate.span]
        done.append(dataclasses.replace(candidate, span=mentions[seen[candidate.tag] % len(mentions)]))
        seen[candidate.tag] += candidate.rejected is None
    return done


def _mark(candidates: Sequence[Entity], verdicts: Sequence[Rejection | None]) -> list[Entity]:
    return [_with(c, v) for c, v in zip(candidates, verdicts, strict=True)]


def _with(candidate: Entity, rejected: Rejection | None) -> Entity:
    return dataclasses.replace(candidate, rejected=rejected)
