"""How far a dataset is: what its run tells, or where none is at work, what the manifests do."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.text import Text

from datapipe.inspect.summary import Totals, count_manifests
from datapipe.plan import read_run, slices_of
from datapipe.progress import display, flow, left_s, rows_per_s
from datapipe.schema import Outcome, printable
from datapipe.shards import Store, present
from datapipe.status import Status, read_status

SILENT_S = 60.0
"""A run that has told nothing new for longer may be gone."""


@dataclass(frozen=True)
class AtWork:
    """A run is at work, or was killed. `heard_s`: seconds since it told something new."""

    status: Status
    heard_s: float

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        told = {"state": "running", "last_heard_s": self.heard_s, "step": self.status.step}
        phase, done, elapsed_s = self.status.phase, self.status.done, self.status.elapsed_s
        if phase is None:
            return told
        there, slowest = phase.shards_before + done.shards, done.slowest()
        return {
            **told,
            "shards": {"done": there, "left": phase.shards - there},
            "rows_per_s": rows_per_s(phase, done, elapsed_s),
            "left_s": left_s(phase, done, elapsed_s),
            "stages": {
                stage.value: {
                    "rows": tally.rows,
                    "left": max(expected - tally.rows, 0),
                    "dropped": tally.dropped,
                    "failed": tally.failed,
                    "failed_by": {reason.value: rows for reason, rows in tally.failed_by.items()},
                    "busy_s": tally.busy_s,
                }
                for stage, tally, expected in flow(phase, done)
            },
            "slowest_stage": None if slowest is None else slowest[0].value,
            "workers": dict(phase.workers),
        }

    def __rich__(self) -> Group:
        parts = [Text(f"last heard {self.heard_s:,.0f} s ago")]
        if self.heard_s > SILENT_S:
            parts.append(Text("if the run was killed, the same command goes on", "yellow"))
        phase, done = self.status.phase, self.status.done
        if phase is None:
            return Group(*parts, Text(printable(self.status.step), "bold"))
        details = []
        if slowest := done.slowest():
            details.append(f"slowest: {slowest[0].value}, {slowest[1]:.0%} of workers' time")
        for (stage, reason), rows in done.failures().most_common():
            details.append(f"failed: {stage.value} {reason.value} {rows:,}")
        details += [f"workers: {size} of {printable(pool)}" for pool, size in phase.workers.items()]
        return Group(*parts, display(phase, done, self.status.elapsed_s), *map(Text, details))


@dataclass(frozen=True)
class AtRest:
    """No run is at work. `slices`: of the whole dataset; `fetched`: its raw shards; `totals`: of its shards, None where
    there are none."""

    slices: int
    fetched: int
    totals: Totals | None

    @property
    def shards(self) -> int:
        return self.totals.shards if self.totals else 0

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "state": "finished" if self.shards == self.slices else "unfinished",
            "shards": {"done": self.shards, "left": self.slices - self.shards},
            "fetched_shards": self.fetched,
            "totals": self.totals.to_json() if self.totals else None,
        }

    def __rich__(self) -> Group:
        lines = [f"{self.shards:,}/{self.slices:,} shards"]
        if self.shards == self.slices:
            lines = [f"finished: {lines[0]}"]
        else:
            lines += [f"{self.fetched:,}/{self.slices:,} fetched", "no run is at work; the same command goes on"]
        if self.totals:
            counts = ", ".join(f"{self.totals.outcomes[outcome]:,} {outcome.value}" for outcome in Outcome)
            lines.append(f"{self.totals.rows:,} rows: {counts}")
        return Group(*map(Text, lines))


def state_of(store: Store) -> AtWork | AtRest:
    """Raises ShardError for a folder that is no dataset's."""
    if (status := read_status(store)) is not None:
        return AtWork(status, max(0.0, time.time() - status.told_at))  # the clock may be another machine's
    run = read_run(store)
    totals = count_manifests(store) if present(store, "shard") else None
    return AtRest(slices_of(run.parts, run.recipe.slice_rows), len(present(store, "raw")), totals)
