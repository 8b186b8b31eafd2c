"""What is in a dataset: how many rows came in, where they went, and what was kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table

from datapipe.errors import ShardError
from datapipe.schema import Outcome, Reason, StageName
from datapipe.shards import Store, iter_tables, manifests

LARGEST_TAGS = 20


@dataclass
class Summary:
    """Counts over a dataset or one shard of it."""

    shards: int = 0
    rows: int = 0
    tar_bytes: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    reasons: Counter[tuple[StageName, Reason]] = field(default_factory=Counter)
    outcome_of_reason: dict[tuple[StageName, Reason], Outcome] = field(default_factory=dict)
    entities_per_image: Counter[int] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)


def summarise(store: Store, shard: int | None = None) -> Summary:
    """Reads the sidecars one after another. Raises ShardError when there are none."""
    summary = Summary()
    for manifest in manifests(store, "shard"):
        if shard in (None, manifest.index):
            summary.shards += 1
            summary.tar_bytes += manifest.tar.size
    if not summary.shards:
        what = "no shards" if shard is None else f"no shard {shard}"
        raise ShardError(f"{store.root}: {what} here; `make dataset OUT={store.root}` makes them")
    for table in iter_tables(store, "shard", ["outcome", "stage", "reason", "candidates"], shard):
        for row in table.to_pylist():
            outcome = Outcome(row["outcome"])
            summary.rows += 1
            summary.outcomes[outcome] += 1
            if row["reason"] is not None:
                key = StageName(row["stage"]), Reason(row["reason"])
                summary.reasons[key] += 1
                summary.outcome_of_reason[key] = outcome
            if outcome is Outcome.KEPT:
                entities = [c["tag"] for c in row["candidates"] if c["rejected"] is None]
                summary.entities_per_image[len(entities)] += 1
                summary.tags.update(entities)
    return summary


def funnel(summary: Summary) -> Table:
    """Rows in, what each stage took and why, rows kept."""
    table = Table(title="funnel", title_justify="left", box=None)
    for heading in ("stage", "reason", "outcome"):
        table.add_column(heading)
    for heading in ("rows", "left"):
        table.add_column(heading, justify="right")
    left = summary.rows
    table.add_row("input", "", "", "", f"{left:,}")
    for stage in StageName:
        for key in (k for k in sorted(summary.reasons) if k[0] is stage):
            count = summary.reasons[key]
            left -= count
            table.add_row(stage.value, key[1].value, summary.outcome_of_reason[key].value, f"-{count:,}", f"{left:,}")
    table.add_row("kept", "", "", "", f"{left:,}", style="bold")
    return table


def tables(summary: Summary) -> Group:
    """Everything that a summary holds, for the terminal."""
    totals = Table(box=None, title="dataset", title_justify="left")
    for heading in ("shards", "rows", *(o.value for o in Outcome), "entities", "tar size"):
        totals.add_column(heading, justify="right")
    entities = sum(count * images for count, images in summary.entities_per_image.items())
    outcomes = [f"{summary.outcomes[o]:,}" for o in Outcome]
    size = f"{summary.tar_bytes / 1e6:,.1f} MB"
    totals.add_row(f"{summary.shards:,}", f"{summary.rows:,}", *outcomes, f"{entities:,}", size)

    per_image = Table("entities per image", "images", "", box=None)
    most = max(summary.entities_per_image.values(), default=1)
    for count, images in sorted(summary.entities_per_image.items()):
        per_image.add_row(str(count), f"{images:,}", "█" * max(1, round(30 * images / most)))

    largest = Table("tag", "entities", box=None, title=f"largest of {len(summary.tags)} tags", title_justify="left")
    for tag, count in sorted(summary.tags.items(), key=lambda item: (-item[1], item[0]))[:LARGEST_TAGS]:
        largest.add_row(tag, f"{count:,}")
    return Group(totals, "", funnel(summary), "", per_image, "", largest)
