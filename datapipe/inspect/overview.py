"""What report and card both tell of a dataset in numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datapipe.inspect.funnel import Losses, funnel
from datapipe.inspect.statistics import Statistics, most_common
from datapipe.inspect.summary import Totals, count_manifests
from datapipe.plan import RunRecord, retried
from datapipe.schema import Outcome, Reason, StageName
from datapipe.shards import Manifest, Store

_LISTED = 20
_RARE = 8
_TOGETHER = 14


def overview(
    store: Store,
    every: Sequence[Manifest],
    looked_into: Sequence[Manifest],
    statistics: Statistics,
    run: RunRecord | None,
) -> dict[str, Any]:
    """Values for the templates, by name. `every`: all manifests; `looked_into`: those that the statistics are of."""
    totals = count_manifests(store)
    return {
        "name": store.root.rpartition("/")[2] or store.root,
        "numbers": _numbers(totals, statistics),
        "scope": _scope(every, looked_into, statistics),
        "funnel": funnel(totals.rows, _losses(every, statistics, run)),
        **_tables(statistics),
        "models": sorted((run.models if run else every[0].provenance.models).items()),
        "recipe": [(key, json.dumps(value)) for key, value in sorted(run.identity.items())] if run else [],
    }


def _numbers(totals: Totals, statistics: Statistics) -> list[tuple[str, str]]:
    share = totals.outcomes[Outcome.KEPT] / max(totals.rows, 1)
    return [
        (f"{totals.rows:,}", "rows in"),
        (f"{totals.outcomes[Outcome.KEPT]:,}", f"kept ({share:.1%})"),
        (f"{statistics.entities / max(statistics.kept, 1):.2f}", "entities per image"),
        (f"{len(statistics.tags):,}", "tags"),
        (f"{totals.shards:,}", "shards"),
        (f"{totals.tar_bytes / 1e6:,.1f} MB", "of tars"),
    ]


def _scope(every: Sequence[Manifest], looked_into: Sequence[Manifest], statistics: Statistics) -> str:
    if len(looked_into) == len(every):
        return "All counts are of the whole dataset."
    return (
        f"The funnel is of the whole dataset. Everything else is a sample: {len(looked_into):,} of {len(every):,} "
        f"shards, chosen at random, with {statistics.rows:,} of {sum(m.rows for m in every):,} rows."
    )


def _losses(every: Sequence[Manifest], statistics: Statistics, run: RunRecord | None) -> Losses:
    """Exact, from the manifests; whether a reason dropped rows or failed them is known from those looked at."""
    outcomes = {(stage, reason): outcome for stage, reason, outcome in statistics.losses}
    losses: Counter[tuple[StageName, Reason, Outcome]] = Counter()
    for manifest in every:
        for name, rows in manifest.reasons.items():
            stage, _, reason = name.partition("/")
            key = StageName(stage), Reason(reason)
            losses[*key, outcomes.get(key, Outcome.DROPPED)] += rows
    again = retried(run.parts if run else ())
    losses.subtract({(*key, Outcome.FAILED): rows for key, rows in again.items()})
    return +losses


def _tables(statistics: Statistics) -> dict[str, Any]:
    """Those that follow from the statistics alone."""
    tags = most_common(statistics.tags, len(statistics.tags))
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
        "hosts": most_common(statistics.hosts, _LISTED),
        "licences": most_common(statistics.licences, _LISTED),
        "opt_outs": most_common(statistics.opt_outs, _LISTED),
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
