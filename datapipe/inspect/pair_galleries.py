"""Pairs side by side: those nearest to each threshold, on either side of it, and some of each reason."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.inspect.galleries import Edge, Gallery, GalleryItem, TopK
from datapipe.inspect.random_choice import rank
from datapipe.pairs.settings import DecideSettings, settings_of
from datapipe.schema import decisive
from datapipe.schema.pairs import PAIRS, PairRejection
from datapipe.shards import Manifest, Store
from subject_diffusion.errors import ShardError

PAIRS_AT_AN_EDGE = 6
PAIRS_OF_A_KIND = 6

Pair = dict[str, Any]
"""A row of `pairs.parquet`."""


@dataclass(frozen=True)
class PairThreshold:
    """A threshold of `decide.*`: the measure that it cuts, and why a candidate is refused beyond it; `lower`: below
    it, else above."""

    setting: str
    measure: str
    rejection: PairRejection
    lower: bool


PAIR_THRESHOLDS = (
    PairThreshold("min_similarity", "similarity", PairRejection.UNLIKE, True),
    PairThreshold("min_patch_similarity", "patch_similarity", PairRejection.UNLIKE, True),
    PairThreshold("min_margin", "margin", PairRejection.AMBIGUOUS, True),
    PairThreshold("max_aligned", "aligned", PairRejection.NEAR_COPY, False),
    PairThreshold("min_copy_bits", "copy_bits", PairRejection.NEAR_COPY, True),
)


def read_pairs(store: Store) -> Iterator[Pair]:
    """The candidates, in parts. Raises ShardError."""
    with store.open(PAIRS) as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError):
            raise ShardError(f"{store.root}/{PAIRS}: cannot be read; run `sdd pairs` again") from None


class PairGalleries:
    """Fed with the candidates; holds a bounded number of them."""

    def __init__(self, settings: DecideSettings, every: Sequence[Manifest], seed: int) -> None:
        """`every`: all manifests, in order."""
        self._settings, self._seed = settings, seed
        self._shards, self._first_rows = [m.index for m in every], [m.first_row for m in every]
        self._edges = [(TopK[Pair](PAIRS_AT_AN_EDGE), TopK[Pair](PAIRS_AT_AN_EDGE)) for _ in PAIR_THRESHOLDS]
        self._kinds: dict[PairRejection | None, TopK[Pair]] = {}
        self._seen = 0

    def add(self, pair: Pair) -> None:
        self._seen += 1
        rejection = PairRejection(pair["rejected"]) if pair["rejected"] else None
        order = float(int(rank(f"{pair['key_a']}/{pair['entity_a']}/{pair['key_b']}", self._seed)[:12], 16))
        self._kinds.setdefault(rejection, TopK(PAIRS_OF_A_KIND)).add(order, self._seen, pair)
        for threshold, (passed, refused) in zip(PAIR_THRESHOLDS, self._edges, strict=True):
            value, limit = pair[threshold.measure], getattr(self._settings, threshold.setting)
            if value is None:
                continue
            is_beyond = value < limit if threshold.lower else value > limit
            if rejection is None and not is_beyond:
                passed.add(abs(value - limit), self._seen, pair)
            elif rejection is threshold.rejection and is_beyond:
                refused.add(abs(value - limit), self._seen, pair)

    def edges(self) -> list[Edge]:
        """Those that any candidate was refused at."""
        return [
            Edge(
                t.measure,
                ((t.setting, limit),),
                Gallery("just passed", self._side_by_side(passed.items, t.measure, limit)),
                Gallery("just refused", self._side_by_side(refused.items, t.measure, limit)),
            )
            for t, (passed, refused) in zip(PAIR_THRESHOLDS, self._edges, strict=True)
            for limit in [float(getattr(self._settings, t.setting))]
            if refused.heap
        ]

    def kinds(self) -> list[Gallery]:
        """Pairs, and candidates of each reason, at random."""
        return [
            Gallery("pairs" if kind is None else kind.value, self._side_by_side(self._kinds[kind].items, "margin"))
            for kind in (None, *PairRejection)
            if kind in self._kinds
        ]

    def _side_by_side(self, pairs: Sequence[Pair], measure: str, limit: float | None = None) -> tuple[GalleryItem, ...]:
        return tuple(self._item(pair, end, measure, limit) for pair in pairs for end in "ab")

    def _item(self, pair: Pair, end: str, measure: str, limit: float | None) -> GalleryItem:
        row, value = int(pair[f"key_{end}"]), pair[measure]
        shard = self._shards[bisect.bisect_right(self._first_rows, row) - 1]
        shown = "" if value is None else f" {value:.3g}" if limit is None else f" {decisive(value, limit)}"
        return GalleryItem(shard, row, entity=pair[f"entity_{end}"], note=pair[f"tag_{end}"] + shown)


def pair_galleries(store: Store, every: Sequence[Manifest], seed: int) -> PairGalleries | None:
    """None where `sdd pairs` found nothing yet. Raises ShardError, RecipeError."""
    if not store.exists(PAIRS):
        return None
    galleries = PairGalleries(settings_of(store, ()).decide, every, seed)
    for pair in read_pairs(store):
        galleries.add(pair)
    return galleries
