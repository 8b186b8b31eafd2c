"""A dataset as one HTML page that needs no network: counts, distributions, and galleries to look through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datapipe.inspect.galleries import Galleries, Gallery, GalleryItem
from datapipe.inspect.overview import overview
from datapipe.inspect.pages import html_page
from datapipe.inspect.pair_audit import pair_precision
from datapipe.inspect.pair_galleries import pair_galleries
from datapipe.inspect.picture_cards import by_id, sample_cards
from datapipe.inspect.row_list import LISTED_PX, MOST_PICTURES, RowList
from datapipe.inspect.statistics import MOST_ROWS, Statistics, choose_shards, statistics_rows, throughput
from datapipe.plan import found_words, read_found, read_run
from datapipe.shards import RUN_FILE, Store
from datapipe.stages.select import SelectSettings

REPORT_FILE = "report.html"
_ANCHORS = {"pair_kinds": "pairs"}
"""Anchors of sections that are not called what they show."""


def report_page(store: Store, seed: int = 0, most_rows: int = MOST_ROWS) -> str:
    """The page. What comes from the web is escaped, and only the page's own script may run. Raises ShardError."""
    run = read_run(store) if store.exists(RUN_FILE) else None
    every, looked_into = choose_shards(store, seed, most_rows)
    statistics = Statistics()
    galleries = Galleries(run.recipe.select if run else SelectSettings(), every, seed)
    listed = RowList(seed)
    for row in statistics_rows(store, looked_into):
        statistics.add(row)
        galleries.add(row)
        listed.add(row)
    pairs = pair_galleries(store, every, seed)
    shown: dict[str, Any] = {
        "kept": galleries.kept(),
        "edges": galleries.edges() if run else [],
        "lost": galleries.lost(),
        "refused": galleries.refused(),
        "pair_edges": pairs.edges() if pairs else [],
        "pair_kinds": pairs.kinds() if pairs else [],
    }
    cards = sample_cards(store, _items(shown))
    small = sample_cards(store, (p for p in listed.pictures() if p.place not in cards), picture_px=LISTED_PX)
    return html_page(
        "report",
        **overview(store, every, looked_into, statistics, run),
        **shown,
        pair_precision=pair_precision(store) if pairs else "",
        sections=_sections(shown),
        rows_words=_rows_words(listed),
        throughput=throughput(store),
        found_on_gpu=found_words(read_found(store)),
        cards=cards,
        data={"samples": by_id([*small.values(), *cards.values()]), "rows": listed.rows()},
        scripts=("picture", "gallery", "rows"),
    )


def _rows_words(listed: RowList) -> str:
    shown, pictures = len(listed.rows()), len(listed.pictures())
    of = "Every row" if shown == listed.seen else f"{shown:,} of {listed.seen:,} rows, chosen at random"
    if pictures < MOST_PICTURES:
        return f"{of}, with its picture where there is one."
    return f"{of}; {pictures:,} of them with a picture. `sdd inspect --sample KEY` draws any."


def _items(shown: dict[str, Any]) -> Iterator[GalleryItem]:
    galleries: list[Gallery] = [shown["kept"], *shown["lost"], *shown["refused"], *shown["pair_kinds"]]
    for edge in (*shown["edges"], *shown["pair_edges"]):
        galleries += [edge.above, edge.below]
    return (item for gallery in galleries for item in gallery.items)


def _sections(shown: dict[str, Any]) -> list[tuple[str, str]]:
    titles = {
        "funnel": "funnel", "kept": "kept", "rows": "rows", "distributions": "distributions", "tags": "tags",
        "sources": "sources", "throughput": "throughput", "edges": "edges", "pair_kinds": "pairs", "lost": "lost",
        "refused": "boxes", "made": "made with",
    }  # fmt: skip
    return [(_ANCHORS.get(name, name), title) for name, title in titles.items() if shown.get(name, True)]
