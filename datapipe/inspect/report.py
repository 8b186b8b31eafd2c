"""A dataset as one HTML page that needs no network: counts, distributions, and galleries to look through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datapipe.inspect.cards import cards_of, details_of
from datapipe.inspect.galleries import Galleries, Gallery, Pick
from datapipe.inspect.overview import overview
from datapipe.inspect.pages import html_page
from datapipe.inspect.statistics import MOST_ROWS, Statistics, rows_of, sampled, throughput
from datapipe.plan import read_run
from datapipe.shards import RUN_FILE, Store
from datapipe.stages.select import SelectSettings

REPORT_FILE = "report.html"


def report(store: Store, seed: int = 0, most_rows: int = MOST_ROWS) -> str:
    """The page. What comes from the web is escaped, and only the page's own script may run. Raises ShardError."""
    run = read_run(store) if store.exists(RUN_FILE) else None
    every, looked_into = sampled(store, seed, most_rows)
    statistics = Statistics()
    galleries = Galleries(run.recipe.select if run else SelectSettings(), every, seed)
    for row in rows_of(store, looked_into):
        statistics.add(row)
        galleries.add(row)
    shown: dict[str, Any] = {
        "kept": galleries.kept(),
        "edges": galleries.edges() if run else [],
        "lost": galleries.lost(),
        "refused": galleries.refused(),
    }
    cards = cards_of(store, _picks(shown))
    return html_page(
        "report",
        **overview(store, every, looked_into, statistics, run),
        **shown,
        sections=_sections(shown),
        lost_words="Images that were refused before or at screening are not stored; those of later stages are, as long "
        "as the raw shards are.",
        throughput=throughput(store),
        cards=cards,
        details=details_of(cards.values()),
    )


def _picks(shown: dict[str, Any]) -> Iterator[Pick]:
    galleries: list[Gallery] = [shown["kept"], *shown["lost"], *shown["refused"]]
    for _, _, above, below in shown["edges"]:
        galleries += [above, below]
    return (pick for gallery in galleries for pick in gallery.picks)


def _sections(shown: dict[str, Any]) -> list[tuple[str, str]]:
    titles = {
        "funnel": "funnel", "kept": "kept", "distributions": "distributions", "tags": "tags", "sources": "sources",
        "throughput": "throughput", "edges": "edges", "lost": "lost", "refused": "boxes", "made": "made with",
    }  # fmt: skip
    return [(anchor, title) for anchor, title in titles.items() if shown.get(anchor, True)]
