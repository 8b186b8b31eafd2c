"""The rows of a dataset as the report lists them, to be searched, filtered and sorted."""

from __future__ import annotations

from typing import Any

from datapipe.inspect.galleries import GalleryItem, TopK
from datapipe.inspect.random_choice import rank
from datapipe.inspect.statistics import Row
from datapipe.schema import Outcome, StageName

MOST_LISTED = 10_000
MOST_PICTURES = 2_000
"""Pictures of the listed rows. A picture with its outlines takes some 7 KB of the page."""
LISTED_PX = 160
"""The long side of a picture in the list."""

ListedRow = dict[str, Any]
"""What the page's script knows of a row, without its picture; plain types."""


class RowList:
    """Fed with the rows of a dataset, in any order; holds `MOST_LISTED` of them, chosen at random."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rows: TopK[tuple[GalleryItem, ListedRow]] = TopK(MOST_LISTED)
        self._pictures: TopK[GalleryItem] = TopK(MOST_PICTURES)

    def add(self, row: Row) -> None:
        order = float(int(rank(row["key"], self._seed)[:12], 16))
        item = GalleryItem(row["shard"], row["row"])
        self._rows.add(order, row["row"], (item, _listed(row)))
        if row["pictured"] or row["stage"] not in (StageName.FETCH.value, StageName.SCREEN.value):
            self._pictures.add(order, row["row"], item)

    @property
    def seen(self) -> int:
        return self._rows.seen

    def rows(self) -> list[ListedRow]:
        """In the order of the input."""
        return [listed for item, listed in sorted(self._rows.items, key=lambda pair: pair[0].row)]

    def pictures(self) -> list[GalleryItem]:
        """The rows that are shown with a picture, in any order."""
        listed = {item for item, _ in self._rows.items}
        return [item for item in self._pictures.items if item in listed]


def _listed(row: Row) -> ListedRow:
    candidates = row["candidates"]
    kept = row["outcome"] == Outcome.KEPT.value
    entities = [c for c in candidates if c["rejected"] is None] if kept else []
    return {
        "key": row["key"],
        "fate": "kept" if kept else f"{row['stage']}: {row['reason']}",
        "detail": row["detail"] or "",
        "caption": row["caption"],
        "alt_text": row["alt_text"],
        "url": row["url"],
        "width": row["width"],
        "height": row["height"],
        "tags": sorted({c["tag"] for c in entities or candidates}),
        "refused": sorted({c["rejected"] for c in candidates if c["rejected"] is not None}),
        "entities": len(entities),
        "score": max((round(c["score"], 3) for c in entities or candidates), default=None),
    }
