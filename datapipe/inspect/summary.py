"""What is in a dataset: how many rows came in, where they went, and what was kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table

from datapipe.errors import ShardError
from datapipe.inspect.sidecars import select
from datapipe.schema import Outcome, Reason, StageName
from datapipe.shards import Store, manifests, present

LARGEST_TAGS = 20


@dataclass
class Totals:
    """What the manifests tell, without a look into sidecars."""

    shards: int = 0
    rows: int = 0
    tar_bytes: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        outcomes = {o.value: self.outcomes[o] for o in Outcome}
        return {"shards": self.shards, "rows": self.rows, **outcomes, "tar_bytes": self.tar_bytes}

    def __rich__(self) -> Table:
        table = Table(box=None, title="dataset", title_justify="left")
        for heading in ("shards", "rows", *(o.value for o in Outcome), "tar size"):
            table.add_column(heading, justify="right")
        outcomes = [f"{self.outcomes[o]:,}" for o in Outcome]
        table.add_row(f"{self.shards:,}", f"{self.rows:,}", *outcomes, f"{self.tar_bytes / 1e6:,.1f} MB")
        return table


@dataclass
class Summary:
    """Counts over a dataset or one shard of it."""

    rows: int = 0
    reasons: Counter[tuple[StageName, Reason]] = field(default_factory=Counter)
    outcome_of_reason: dict[tuple[StageName, Reason], Outcome] = field(default_factory=dict)
    entities_per_image: Counter[int] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "reasons": [
                {"stage": stage.value, "reason": reason.value, "outcome": outcome.value, "rows": rows}
                for (stage, reason), outcome, rows in self._losses()
            ],
            "entities_per_image": {str(n): images for n, images in sorted(self.entities_per_image.items())},
            "tags": dict(sorted(self.tags.items(), key=lambda item: (-item[1], item[0]))),
        }

    def _losses(self) -> list[tuple[tuple[StageName, Reason], Outcome, int]]:
        """(stage and reason, outcome, rows), in the order of the stages."""
        keys = [key for stage in StageName for key in sorted(self.reasons) if key[0] is stage]
        return [(key, self.outcome_of_reason[key], self.reasons[key]) for key in keys]

    def funnel(self) -> Table:
        """Rows in, what each stage took and why, rows kept."""
        table = Table(title="funnel", title_justify="left", box=None)
        for heading in ("stage", "reason", "outcome"):
            table.add_column(heading)
        for heading in ("rows", "left"):
            table.add_column(heading, justify="right")
        left = self.rows
        table.add_row("input", "", "", "", f"{left:,}")
        for (stage, reason), outcome, count in self._losses():
            left -= count
            table.add_row(stage.value, reason.value, outcome.value, f"-{count:,}", f"{left:,}")
        table.add_row("kept", "", "", "", f"{left:,}", style="bold")
        return table

    def __rich__(self) -> Group:
        per_image = Table("entities per image", "images", "", box=None)
        most = max(self.entities_per_image.values(), default=1)
        for count, images in sorted(self.entities_per_image.items()):
            per_image.add_row(str(count), f"{images:,}", "█" * max(1, round(30 * images / most)))
        title = f"largest of {len(self.tags):,} tags on {self.tags.total():,} entities"
        largest = Table("tag", "entities", box=None, title=title, title_justify="left")
        for tag, count in sorted(self.tags.items(), key=lambda item: (-item[1], item[0]))[:LARGEST_TAGS]:
            largest.add_row(tag, f"{count:,}")
        return Group(self.funnel(), "", per_image, "", largest)


def count_manifests(store: Store, shard: int | None = None) -> Totals:
    """Raises ShardError when there are none."""
    expect_shards(store, shard)
    totals = Totals()
    for manifest in manifests(store, "shard", shard):
        totals.shards += 1
        totals.rows += manifest.rows
        totals.tar_bytes += manifest.tar.size
        totals.outcomes.update({Outcome(name): rows for name, rows in manifest.counts.items()})
    return totals


def expect_shards(store: Store, shard: int | None = None) -> None:
    """Raises ShardError when there are none. Looks at names alone, which is fast in a bucket too."""
    there = present(store, "shard")
    if not there or shard not in (None, *there):
        what = "no shards" if shard is None else f"no shard {shard}"
        raise ShardError(f"{store.root}: {what} here; `make dataset OUT={store.root}` makes them")


def summarise(store: Store, shard: int | None = None) -> Summary:
    """Reads the sidecars one after another."""
    summary = Summary()
    columns = "outcome, stage, reason, list_transform(entities, lambda e: e.tag) AS tags"
    for row in select(store, columns, shards=manifests(store, "shard", shard)):
        outcome = Outcome(row["outcome"])
        summary.rows += 1
        if row["reason"] is not None:
            key = StageName(row["stage"]), Reason(row["reason"])
            summary.reasons[key] += 1
            summary.outcome_of_reason[key] = outcome
        if outcome is Outcome.KEPT:
            summary.entities_per_image[len(row["tags"])] += 1
            summary.tags.update(row["tags"])
    return summary
