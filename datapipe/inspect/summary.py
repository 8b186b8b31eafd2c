"""What is in a dataset: how many rows came in, where they went, and what was kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table

from datapipe.inspect.funnel import funnel, funnel_table, in_stage_order
from datapipe.inspect.sidecars import select
from datapipe.plan import parts_of, retried
from datapipe.schema import Outcome, Reason, StageName
from datapipe.shards import Store, manifests, present
from subject_diffusion.errors import ShardError

LARGEST_TAGS = 20


@dataclass
class Totals:
    """What the manifests tell, without a look into sidecars. Rows that were retried count once, as what became of them
    in the end."""

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
    """Counts over a dataset or one shard of it. In a dataset, rows that were retried count once, as what became of them
    in the end."""

    rows: int = 0
    losses: Counter[tuple[StageName, Reason, Outcome]] = field(default_factory=Counter)
    entities_per_image: Counter[int] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "reasons": [
                {"stage": stage.value, "reason": reason.value, "outcome": outcome.value, "rows": rows}
                for stage, reason, outcome, rows in in_stage_order(self.losses)
            ],
            "entities_per_image": {str(n): images for n, images in sorted(self.entities_per_image.items())},
            "tags": dict(sorted(self.tags.items(), key=lambda item: (-item[1], item[0]))),
        }

    def funnel(self) -> Table:
        """Rows in, what each stage took and why, rows kept."""
        return funnel_table(funnel(self.rows, self.losses))

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
    require_shards(store, shard)
    totals = Totals()
    for manifest in manifests(store, "shard", shard):
        totals.shards += 1
        totals.rows += manifest.rows
        totals.tar_bytes += manifest.tar.size
        totals.outcomes.update({Outcome(name): rows for name, rows in manifest.counts.items()})
    if shard is None:
        again = retried(parts_of(store)).total()
        totals.rows -= again
        totals.outcomes[Outcome.FAILED] -= again
    return totals


def require_shards(store: Store, shard: int | None = None) -> None:
    """Raises ShardError when there are none. Looks at names alone, which is fast in a bucket too."""
    there = present(store, "shard")
    if not there or shard not in (None, *there):
        what = "no shards" if shard is None else f"no shard {shard}"
        raise ShardError(f"{store.root}: {what} here; name a folder that `sdd dataset --out` wrote, or a tar")


def summarize(store: Store, shard: int | None = None) -> Summary:
    """Reads the sidecars one after another."""
    summary = Summary()
    columns = "outcome, stage, reason, list_transform(entities, lambda e: e.tag) AS tags"
    for row in select(store, columns, shards=manifests(store, "shard", shard)):
        outcome = Outcome(row["outcome"])
        summary.rows += 1
        if row["reason"] is not None:
            summary.losses[StageName(row["stage"]), Reason(row["reason"]), outcome] += 1
        if outcome is Outcome.KEPT:
            summary.entities_per_image[len(row["tags"])] += 1
            summary.tags.update(row["tags"])
    if shard is None:
        again = retried(parts_of(store))
        summary.rows -= again.total()
        summary.losses.subtract({(*key, Outcome.FAILED): rows for key, rows in again.items()})
    return summary
