"""Which images of a dataset a person should see: some at random, some lost in every way, and those at the edges."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from datapipe.inspect.chance import rank
from datapipe.inspect.statistics import Row
from datapipe.schema import Outcome, Reason, Rejection, Sample, StageName
from datapipe.shards import Manifest
from datapipe.stages.select import SelectSettings

T = TypeVar("T")

RANDOM_KEPT = 24
OF_A_REASON = 8
AT_AN_EDGE = 6


Place = tuple[str, int, int]
"""Dataset, shard and row."""


@dataclass(frozen=True)
class Pick:
    """One image of a gallery. `candidate`: which of its candidate boxes is meant, if one is; `note`: why it is here;
    `dataset`: which of several it is from."""

    shard: int
    row: int
    candidate: int | None = None
    note: str = ""
    dataset: str = ""

    @property
    def place(self) -> Place:
        return self.dataset, self.shard, self.row


@dataclass(frozen=True)
class Gallery:
    title: str
    picks: tuple[Pick, ...]


@dataclass(frozen=True)
class Edge:
    """A threshold of selection: `lower` when candidates below it are refused, else those above it."""

    setting: str
    measure: str
    rejection: Rejection
    lower: bool


EDGES = (
    Edge("min_score", "score", Rejection.SCORE, True),
    Edge("text_threshold", "text_score", Rejection.TEXT_SCORE, True),
    Edge("min_area", "area", Rejection.AREA, True),
    Edge("max_area", "area", Rejection.AREA, False),
    Edge("min_aspect", "aspect", Rejection.ASPECT, True),
    Edge("max_aspect", "aspect", Rejection.ASPECT, False),
    Edge("min_mask_fill", "mask_fill", Rejection.MASK_FILL, True),
)


@dataclass
class Best(Generic[T]):
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
    """Fed with the rows of a dataset, in any order; holds a bounded number of picks."""

    def __init__(self, settings: SelectSettings, every: Sequence[Manifest], seed: int) -> None:
        """`every`: all manifests, in order, among which the originals of duplicates are looked up."""
        self._settings = settings
        self._first_rows = [m.first_row for m in every]
        self._every = every
        self._seed = seed
        self._kept: Best[Pick] = Best(RANDOM_KEPT)
        self._lost: dict[tuple[StageName, Reason], Best[Pick]] = {}
        self._refused: dict[Rejection, Best[Pick]] = {}
        self._edges: list[tuple[Best[Pick], Best[Pick]]] = [(Best(AT_AN_EDGE), Best(AT_AN_EDGE)) for _ in EDGES]

    def add(self, row: Row) -> None:
        order = float(int(rank(row["key"], self._seed)[:12], 16))
        if row["outcome"] == Outcome.KEPT.value:
            self._kept.add(order, row["row"], Pick(row["shard"], row["row"]))
        elif row["reason"] is not None:
            best = self._lost.setdefault((StageName(row["stage"]), Reason(row["reason"])), Best(OF_A_REASON))
            best.add(order, row["row"], Pick(row["shard"], row["row"], note=row["detail"]))
        if row["stage"] == StageName.SELECT.value:
            self._add_candidates(row, order)

    def _add_candidates(self, row: Row, order: float) -> None:
        for position, candidate in enumerate(row["candidates"]):
            rejection = candidate["rejected"] and Rejection(candidate["rejected"])
            if rejection:
                best = self._refused.setdefault(rejection, Best(OF_A_REASON))
                best.add(order + position, row["row"], Pick(row["shard"], row["row"], position, candidate["tag"]))
            for edge, (above, below) in zip(EDGES, self._edges, strict=True):
                value = candidate[edge.measure]
                if value is None:
                    continue
                limit = getattr(self._settings, edge.setting)
                pick = Pick(row["shard"], row["row"], position, f"{candidate['tag']} {value:.3f}")
                passes = value > limit if edge.lower else value < limit
                if not rejection and passes:
                    above.add(abs(value - limit), row["row"], pick)
                elif rejection is edge.rejection and not passes:
                    below.add(abs(value - limit), row["row"], pick)

    def kept(self) -> Gallery:
        return Gallery("kept, at random", self._kept.items)

    def edges(self) -> list[tuple[Edge, float, Gallery, Gallery]]:
        """(threshold, its value, those that just pass, those that just do not), where there are any."""
        return [
            (
                edge,
                float(getattr(self._settings, edge.setting)),
                Gallery("just passed", above.items),
                Gallery("just refused", below.items),
            )
            for edge, (above, below) in zip(EDGES, self._edges, strict=True)
            if above.heap or below.heap
        ]

    def lost(self) -> list[Gallery]:
        """One for every reason for which rows were lost, in the order of the stages; duplicates beside originals."""
        return [
            Gallery(f"{stage.value}: {reason.value}", self._with_originals(reason, self._lost[stage, reason].items))
            for stage, reason in sorted(self._lost, key=lambda key: (list(StageName).index(key[0]), key[1].value))
        ]

    def refused(self) -> list[Gallery]:
        """One for every reason for which candidate boxes became no entities."""
        return [Gallery(r.value, self._refused[r].items) for r in Rejection if r in self._refused]

    def _with_originals(self, reason: Reason, picks: tuple[Pick, ...]) -> tuple[Pick, ...]:
        if reason not in (Reason.EXACT_DUPLICATE, Reason.NEAR_DUPLICATE):
            return picks
        pairs = []
        for pick in picks[: OF_A_REASON // 2]:
            original = int(pick.note.removeprefix("of "))
            shard = self._every[bisect.bisect_right(self._first_rows, original) - 1].index
            note = f"the original of {Sample(row=pick.row).key}"
            pairs += [pick, Pick(shard, original, note=note)]
        return tuple(pairs)
