"""A dataset as one HTML page that needs no network: counts, distributions, and galleries to look through."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from datapipe.inspect.cards import cards_of
from datapipe.inspect.galleries import Galleries, Gallery
from datapipe.inspect.statistics import MOST_ROWS, Statistics, largest, rows_of, sampled, throughput
from datapipe.inspect.summary import Totals, count_manifests
from datapipe.plan import RunRecord, read_run
from datapipe.schema import Outcome, Reason, StageName
from datapipe.shards import RUN_FILE, Manifest, Store
from datapipe.stages.select import SelectSettings

REPORT_FILE = "report.html"
_LISTED = 20
_RARE = 8
_TOGETHER = 14

_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("datapipe.inspect", "page"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters["short"] = lambda value: f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def report(store: Store, seed: int = 0, most_rows: int = MOST_ROWS) -> str:
    """The page. What comes from the web is escaped, and only the page's own script may run. Raises ShardError."""
    totals = count_manifests(store)
    run = read_run(store) if store.exists(RUN_FILE) else None
    every, looked_into = sampled(store, seed, most_rows)
    statistics = Statistics()
    galleries = Galleries(run.recipe.select if run else SelectSettings(), every, seed)
    for row in rows_of(store, looked_into):
        statistics.add(row)
        galleries.add(row)
    shown = {
        "kept": galleries.kept(),
        "edges": galleries.edges() if run else [],
        "lost": galleries.lost(),
        "refused": galleries.refused(),
    }
    cards = dict(cards_of(store, _places(shown)))
    # The pictures themselves stand in the page once for each place where they are shown.
    details = {c["key"]: {name: value for name, value in c.items() if name != "src"} for c in cards.values()}
    return render(
        "report",
        name=store.root.rpartition("/")[2] or store.root,
        numbers=_numbers(totals, statistics),
        scope=_scope(every, looked_into, statistics),
        sections=_sections(shown),
        funnel=_funnel(every, statistics, totals.rows),
        **shown,
        **_tables(statistics),
        lost_words="Images that were refused before or at screening are not stored; those of later stages are, as long "
        "as the raw shards are.",
        throughput=throughput(store),
        models=sorted((run.models if run else every[0].provenance.models).items()),
        recipe=_recipe(run),
        cards=cards,
        details=details,
    )


def render(page: str, **context: Any) -> str:
    """A page with its own style and script in it; the policy in its head lets no other script run."""
    loader = _PAGES.loader
    assert loader is not None
    style, script = (loader.get_source(_PAGES, f"{page}.{ending}")[0] for ending in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return _PAGES.get_template(f"{page}.html").render(
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        **context,
    )


def _places(shown: dict[str, Any]) -> Iterator[tuple[int, int]]:
    galleries: list[Gallery] = [shown["kept"], *shown["lost"], *shown["refused"]]
    for _, _, above, below in shown["edges"]:
        galleries += [above, below]
    return ((pick.shard, pick.row) for gallery in galleries for pick in gallery.picks)


def _numbers(totals: Totals, statistics: Statistics) -> list[tuple[str, str]]:
    share = totals.outcomes[Outcome.KEPT] / max(totals.rows, 1)
    return [
        (f"{totals.rows:,}", "rows in"),
        (f"{totals.outcomes[Outcome.KEPT]:,}", f"kept ({share:.1%})"),
        (f"{statistics.entities / max(statistics.kept, 1):.2f}", "entities an image"),
        (f"{len(statistics.tags):,}", "tags"),
        (f"{totals.shards:,}", "shards"),
        (f"{totals.tar_bytes / 1e6:,.1f} MB", "of tars"),
    ]


def _scope(every: Sequence[Manifest], looked_into: Sequence[Manifest], statistics: Statistics) -> str:
    if len(looked_into) == len(every):
        return "All counts are of the whole dataset; galleries show some of it, the same ones for the same seed."
    return (
        f"The funnel is of the whole dataset. Everything else is a sample: {len(looked_into):,} of {len(every):,} "
        f"shards, chosen at random, with {statistics.rows:,} of {sum(m.rows for m in every):,} rows."
    )


def _sections(shown: dict[str, Any]) -> list[tuple[str, str]]:
    titles = {
        "funnel": "funnel", "kept": "kept", "distributions": "distributions", "tags": "tags", "sources": "sources",
        "throughput": "throughput", "edges": "edges", "lost": "lost", "refused": "boxes", "made": "made with",
    }  # fmt: skip
    return [(anchor, title) for anchor, title in titles.items() if shown.get(anchor, True)]


def _funnel(every: Sequence[Manifest], statistics: Statistics, rows: int) -> list[tuple[str, str, str, int, int]]:
    """(stage, reason, outcome, rows lost, rows left). Exact: from the manifests."""
    lost: Counter[str] = Counter()
    for manifest in every:
        lost.update(manifest.reasons)
    outcomes = {f"{s.value}/{r.value}": o.value for s, r, o in statistics.reasons}
    lines = [("input", "", "total", 0, rows)]
    left = rows
    for name in sorted(lost, key=_flow_order):
        left -= lost[name]
        stage, _, reason = name.partition("/")
        lines.append((stage, reason, outcomes.get(name, Outcome.DROPPED.value), lost[name], left))
    return [*lines, ("kept", "", "total", 0, left)]


def _flow_order(name: str) -> tuple[int, str]:
    stage, _, reason = name.partition("/")
    return list(StageName).index(StageName(stage)), Reason(reason).value


def _tables(statistics: Statistics) -> dict[str, Any]:
    """Those that follow from the statistics alone."""
    tags = largest(statistics.tags, len(statistics.tags))
    once = sum(count == 1 for _, count in tags)
    top = sum(count for _, count in tags[:10])
    words = (
        f"{len(tags):,} tags on {statistics.entities:,} entities. The ten largest hold "
        f"{top / max(statistics.entities, 1):.0%} of them; {once:,} tags occur once."
    )
    together = [tag for tag, _ in tags[:_TOGETHER]]
    counts = [[statistics.pairs[min(a, b), max(a, b)] if a != b else 0 for b in together] for a in together]
    return {
        "histograms": [h for h in statistics.histograms.values() if h.total],
        "tags": tags[:_LISTED],
        "rare_tags": tags[_LISTED:][-_RARE:],
        "tag_count": len(tags),
        "tag_words": words,
        "tail": _tail([count for _, count in tags]),
        "together": {"tags": together, "counts": counts, "most": max([1, *map(max, counts)] if counts else [1])},
        "hosts": largest(statistics.hosts, _LISTED),
        "licences": largest(statistics.licences, _LISTED),
        "opt_outs": largest(statistics.opt_outs, _LISTED),
        "entities": max(statistics.entities, 1),
        "kept_rows": max(statistics.kept, 1),
        "rows": max(statistics.rows, 1),
    }


def _tail(counts: Sequence[int]) -> str:
    """Points of a line through (rank, count), both logarithmic, on 100 x 62."""
    if not counts:
        return ""
    most, ranks = math.log(counts[0] + 1), math.log(len(counts) + 1)
    steps = sorted({round((len(counts) ** (i / 60)) - 1) for i in range(61)})
    points = ((100 * math.log(i + 1) / ranks, 60 - 58 * math.log(counts[i] + 1) / most) for i in steps)
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _recipe(run: RunRecord | None) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in sorted(run.identity.items())] if run else []
