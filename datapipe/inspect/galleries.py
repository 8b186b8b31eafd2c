"""Which images of a dataset a person should see: some at random, some lost in every way, and those at the edges."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from datapipe.inspect.random_choice import rank
from datapipe.inspect.statistics import Row
from datapipe.schema import Outcome, Reason, Rejection, Sample, StageName, decisive
from datapipe.shards import Manifest
from datapipe.stages.select import SelectSettings, cut_score

T = TypeVar("T")

RANDOM_KEPT = 24
OF_A_REASON = 8
AT_AN_EDGE = 6


Place = tuple[str, int, int]
"""Dataset, shard and row."""


@dataclass(frozen=True)
class GalleryItem:
    """One image of a gallery. `candidate`: which of its candidate boxes is meant, if one is, or `entity`: which of its
    entities; `note`: why it is here; `dataset`: which of several it is from."""

    shard: int
    row: int
    candidate: int | None = None
    note: str = ""
    dataset: str = ""
    entity: int | None = None

    @property
    def place(self) -> Place:
        return self.dataset, self.shard, self.row


@dataclass(frozen=True)
class Gallery:
    title: str
    items: tuple[GalleryItem, ...]


@dataclass(frozen=True)
class Threshold:
    """A threshold of selection: `lower` when candidates below it are refused, else those above it. `measure`: of a
    candidate, where "score" stands for the one that `select.score` names."""

    setting: str
    measure: str
    rejection: Rejection
    lower: bool


THRESHOLDS = (
    Threshold("min_score", "score", Rejection.SCORE, True),
    Threshold("text_threshold", "text_score", Rejection.TEXT_SCORE, True),
    Threshold("min_area", "area", Rejection.AREA, True),
    Threshold("max_area", "area", Rejection.AREA, False),
    Threshold("min_aspect", "aspect", Rejection.ASPECT, True),
    Threshold("max_aspect", "aspect", Rejection.ASPECT, False),
    Threshold("min_mask_fill", "mask_fill", Rejection.MASK_FILL, True),
    Threshold("max_mask_area", "mask_area", Rejection.MASK_SIZE, False),
)


@dataclass(frozen=True)
class Edge:
    """The boxes nearest to a threshold. `limits`: (setting, value); two where one measure has two thresholds, and the
    same boxes just passed both."""

    measure: str
    limits: tuple[tuple[str, float], ...]
    above: Gallery
    below: Gallery


@dataclass
class TopK(Generic[T]):
    """The `size` items of the smallest order seen so far; where orders tie, the earlier row, and of one row the item
    that came first: two tags may share a box."""

    size: int
    heap: list[tuple[float, int, int, T]] = field(default_factory=list)
    seen: int = 0

    def add(self, order: float, row: int, item: T) -> None:
        self.seen += 1
        entry = (-order, -row, -self.seen, item)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        elif entry > self.heap[0]:
            heapq.heapreplace(self.heap, entry)

    @property
    def items(self) -> tuple[T, ...]:
        return tuple(item for *_, item in sorted(self.heap, reverse=True))


class Galleries:
    """Fed with the rows of a dataset, in any order; holds a bounded number of items."""

    def __init__(self, settings: SelectSettings, every: Sequence[Manifest], seed: int) -> None:
        """`every`: all manifests, in order, among which the originals of duplicates are looked up."""
        self._settings = settings
        self._first_rows = [m.first_row for m in every]
        self._every = every
        self._seed = seed
        self._kept: TopK[GalleryItem] = TopK(RANDOM_KEPT)
        self._lost: dict[tuple[StageName, Reason], TopK[GalleryItem]] = {}
        self._refused: dict[Rejection, TopK[GalleryItem]] = {}
        self._edges: list[tuple[TopK[GalleryItem], TopK[GalleryItem]]] = [
            (TopK(AT_AN_EDGE), TopK(AT_AN_EDGE)) for _ in THRESHOLDS
        ]

    def add(self, row: Row) -> None:
        order = float(int(rank(row["key"], self._seed)[:12], 16))
        if row["outcome"] == Outcome.KEPT.value:
            self._kept.add(order, row["row"], GalleryItem(row["shard"], row["row"]))
        elif row["reason"] not in (None, Reason.NSFW.value):  # a report is shown around
            best = self._lost.setdefault((StageName(row["stage"]), Reason(row["reason"])), TopK(OF_A_REASON))
            # Those with a thumbnail first: of what screening dropped only some have one.
            best.add(
                order - 2.0**48 * row["pictured"], row["row"], GalleryItem(row["shard"], row["row"], note=row["detail"])
            )
        if row["stage"] == StageName.SELECT.value:
            self._add_candidates(row, order)

    def _add_candidates(self, row: Row, order: float) -> None:
        for position, candidate in enumerate(row["candidates"]):
            rejection = candidate["rejected"] and Rejection(candidate["rejected"])
            if rejection:
                best = self._refused.setdefault(rejection, TopK(OF_A_REASON))
                best.add(
                    order + position, row["row"], GalleryItem(row["shard"], row["row"], position, candidate["tag"])
                )
            for edge, (above, below) in zip(THRESHOLDS, self._edges, strict=True):
                value, limit = candidate[self._measure(edge)], getattr(self._settings, edge.setting)
                if value is None or limit is None:
                    continue
                if edge.setting == "min_score":
                    value = cut_score(value, self._settings.score_digits)
                note = f"{candidate['tag']} {decisive(value, limit)}"
                if not rejection:
                    above.add(abs(value - limit), row["row"], GalleryItem(row["shard"], row["row"], position, note))
                elif rejection is edge.rejection and (value <= limit if edge.lower else value >= limit):
                    note += f" {'=' if value == limit else '<' if edge.lower else '>'} {limit:g}"
                    below.add(abs(value - limit), row["row"], GalleryItem(row["shard"], row["row"], position, note))

    def _measure(self, edge: Threshold) -> str:
        return "text_score" if edge.measure == "score" and self._settings.score == "phrase" else edge.measure

    def kept(self) -> Gallery:
        return Gallery("kept, at random", self._kept.items)

    def edges(self) -> list[Edge]:
        """Those that any box came near to."""
        found: list[Edge] = []
        for threshold, (above, below) in zip(THRESHOLDS, self._edges, strict=True):
            if not above.heap and not below.heap:
                continue
            edge = Edge(
                self._measure(threshold),
                ((threshold.setting, float(getattr(self._settings, threshold.setting))),),
                Gallery("just passed", above.items),
                Gallery("just refused", below.items),
            )
            merged = _merged(found[-1], edge) if found else None
            if merged is None:
                found.append(edge)
            else:
                found[-1] = merged
        return found

    def lost(self) -> list[Gallery]:
        """One for every reason for which rows were lost, in the order of the stages; duplicates beside originals."""
        return [
            Gallery(f"{stage.value}: {reason.value}", self._with_originals(reason, self._lost[stage, reason].items))
            for stage, reason in sorted(self._lost, key=lambda key: (list(StageName).index(key[0]), key[1].value))
        ]

    def refused(self) -> list[Gallery]:
        """One for every reason for which candidate boxes became no entities."""
        return [Gallery(r.value, self._refused[r].items) for r in Rejection if r in self._refused]

    def _with_originals(self, reason: Reason, items: tuple[GalleryItem, ...]) -> tuple[GalleryItem, ...]:
        if reason not in (Reason.EXACT_DUPLICATE, Reason.NEAR_DUPLICATE):
            return items
        pairs = []
        for item in items[: OF_A_REASON // 2]:
            original = int(item.note.removeprefix("of "))
            shard = self._every[bisect.bisect_right(self._first_rows, original) - 1].index
            note = f"the original of {Sample(row=item.row).key}"
            pairs += [item, GalleryItem(shard, original, note=note)]
        return tuple(pairs)


def _merged(one: Edge, other: Edge) -> Edge | None:
    """Both in one, where the same boxes would be shown twice; else None."""
    below = {edge.below for edge in (one, other) if edge.below.items}
    if one.measure != other.measure or one.above != other.above or len(below) > 1:
        return None
    return Edge(one.measure, one.limits + other.limits, one.above, next(iter(below), one.below))
