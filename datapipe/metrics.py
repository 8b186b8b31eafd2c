"""A run's numbers as metrics of Ray's, which Ray serves to Prometheus with `ray_` before each name."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from datapipe.progress import Done, Phase, left_s
from datapipe.shards import Kind


class Metrics:
    """The metrics of a phase that makes shards of a kind. manifests/cluster/grafana.json shows every one of them."""

    def __init__(self, phase: Phase, makes: Kind) -> None:
        self._phase, self._makes = phase, makes
        self._rows = Total("sdd_rows_total", "Rows that a stage is done with.", "stage", "outcome")
        self._failed = Total("sdd_failed_rows_total", "Rows that failed, by why.", "stage", "reason")
        self._busy = Total("sdd_stage_busy_seconds_total", "Seconds of all workers in a stage.", "stage")
        self._shards = Gauge("sdd_shards", "Shards of the dataset.", ("kind", "state"))
        self._left = Gauge("sdd_left_seconds", "Seconds until the run's end, as expected now.")
        self._workers = Gauge("sdd_workers", "Actors of a pool.", ("pool",))
        self._number = Gauge(
            "sdd_phase",
            "The phase that the run is in: 1 fetches, and annotates where no duplicates are sought; 2 annotates.",
        )

    def __call__(self, done: Done, elapsed_s: float) -> None:
        for stage, tally in done.tallies.items():
            self._busy.reaches(tally.busy_s, stage.value)
            self._rows.reaches(tally.rows - tally.dropped - tally.failed, stage.value, "kept")
            self._rows.reaches(tally.dropped, stage.value, "dropped")
            self._rows.reaches(tally.failed, stage.value, "failed")
        for (stage, reason), rows in done.failures().items():
            self._failed.reaches(rows, stage.value, reason.value)
        there = self._phase.shards_before + done.shards
        self._shards.set(there, {"kind": self._makes, "state": "done"})
        self._shards.set(self._phase.shards - there, {"kind": self._makes, "state": "missing"})
        self._left.set(left_s(self._phase, done, elapsed_s))
        for pool, size in self._phase.workers.items():
            self._workers.set(size, {"pool": pool})
        self._number.set(self._phase.number)


class Total:
    """A counter that is told sums. One that falls, because a slice begins again after its worker died, counts on only
    from where it was."""

    def __init__(self, name: str, description: str, *tags: str) -> None:
        self._counter = Counter(name, description, tags)
        self._tags = tags
        self._reached: dict[tuple[str, ...], float] = {}

    def reaches(self, value: float, *tags: str) -> None:
        more = value - self._reached.get(tags, 0)
        if more > 0:
            self._counter.inc(more, dict(zip(self._tags, tags, strict=True)))
            self._reached[tags] = value
