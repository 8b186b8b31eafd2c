"""How well a dataset made from the toy web agrees with what was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from datapipe.schema import Entity, Sample, current, from_table
from datapipe.shards import Store, iter_tables

MATCH_IOU = 0.5


@dataclass(frozen=True)
class Agreement:
    """Agreement over the kept images. Shares lie in 0..1; `mask_iou` is the mean over matched entities."""

    images: int
    captions_exact: float
    """Share of captions that name exactly the nouns that were drawn."""
    precision: float
    recall: float
    mask_iou: float

    @property
    def f1(self) -> float:
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-9)

    def __rich__(self) -> Table:
        table = Table(title=f"against the known truth, over {self.images} kept images", title_justify="left", box=None)
        for heading in ("captions exact", "entity precision", "entity recall", "entity F1", "mask IoU"):
            table.add_column(heading, justify="right")
        values = (self.captions_exact, self.precision, self.recall, self.f1, self.mask_iou)
        table.add_row(*(f"{value:.3f}" for value in values))
        return table


def score_against_truth(store: Store, truth: Path) -> Agreement:
    """Compares the kept rows of a dataset with the truth that the toy web was drawn from."""
    return score(kept_with_truth(store, truth))


def kept_with_truth(store: Store, truth: Path) -> Iterator[tuple[Sample, Sample]]:
    """Every kept row of a dataset, and what was drawn there."""
    drawn = {s.url: s for s in from_table(current(pq.read_table(truth)))}
    kept = (s for table in iter_tables(store, "shard") for s in from_table(current(table)) if s.is_kept)
    return ((s, drawn[s.url]) for s in kept)


def score(pairs: Iterable[tuple[Sample, Sample]]) -> Agreement:
    """`pairs`: (found, drawn) of kept images. An entity is right when its noun is and its box overlaps by IoU 0.5."""
    images = exact = found_count = drawn_count = matched = 0
    overlaps = 0.0
    for found, drawn in pairs:
        images += 1
        exact += {t.text for t in found.tags} == {t.text for t in drawn.tags}
        right = matches(found.entities, drawn.candidates)
        ious = [_mask_iou(found.entities[f], drawn.candidates[d]) for f, d in right.items()]
        matched += len(ious)
        overlaps += sum(ious)
        found_count += len(found.entities)
        drawn_count += len(drawn.candidates)
    return Agreement(
        images,
        exact / max(images, 1),
        matched / max(found_count, 1),
        matched / max(drawn_count, 1),
        overlaps / max(matched, 1),
    )


def matches(found: Sequence[Entity], drawn: Sequence[Entity]) -> dict[int, int]:
    """Which found entities are right, and which drawn one each is: every drawn one at most once, for the box that fits
    it best."""
    if not found or not drawn:
        return {}
    boxes = coco_mask.iou(_xywh(found), _xywh(drawn), [0] * len(drawn))
    same_noun = np.array([[f.tag == d.tag for d in drawn] for f in found])
    overlap = np.where(same_noun, boxes, 0.0)
    pairs = zip(*linear_sum_assignment(-overlap), strict=True)
    return {int(f): int(d) for f, d in pairs if overlap[f, d] >= MATCH_IOU}


def _xywh(entities: Sequence[Entity]) -> np.ndarray:
    """(N, 4) float64, x, y, width, height in pixels, as pycocotools wants boxes."""
    boxes = np.array([e.box for e in entities], np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _mask_iou(found: Entity, drawn: Entity) -> float:
    if found.mask is None or drawn.mask is None:
        return 0.0
    encoded = [m.to_coco() for m in (found.mask, drawn.mask)]
    return float(coco_mask.iou(encoded[:1], encoded[1:], [0])[0, 0])
