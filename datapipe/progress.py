"""What a run shows while it works: the phase, shards, rows/s and time left, and what each stage kept and lost."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from datapipe.ledger import Tally
from datapipe.schema import Reason, StageName
from datapipe.shards import Store

REFRESH_S = 0.5
THROUGHPUT_FILE = "throughput.jsonl"
"""One line per phase that ended well. No shard depends on it."""
PLAIN_REFRESH_S = (10.0, 600.0)
"""Least and most seconds between lines where the output is no terminal but, for example, a log file."""
PLAIN_REFRESH_SHARE = 0.05
"""Between these, the next line comes after this share of the time that the phase has taken."""


@dataclass(frozen=True)
class Phase:
    """A part of a run that makes all shards of a kind.

    `teams`: the stages in order; those of one team are done beside those of another. `rows`: how many enter the first
    stage; `joining`: by a later stage, how many enter there. `shards`: of the whole dataset; `shards_before`: those of
    earlier runs.
    `stage_s`: what a row is expected to take in a stage, in seconds of a worker, where that is known. `later_row_s`:
    what a row that this phase keeps will take in the next, in seconds of the run. `workers`: the size of each pool of
    actors, by its name.
    """

    number: int
    of: int
    teams: Sequence[Sequence[StageName]]
    rows: int
    shards: int
    shards_before: int
    stage_s: Mapping[StageName, float]
    later_row_s: float = 0.0
    workers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    joining: Mapping[StageName, int] = dataclasses.field(default_factory=dict)

    @property
    def stages(self) -> list[StageName]:
        return [stage for team in self.teams for stage in team]


@dataclass(frozen=True)
class Done:
    """What a phase has done so far. `shards`: of this run."""

    tallies: Mapping[StageName, Tally] = dataclasses.field(default_factory=dict)
    shards: int = 0

    def failures(self) -> Counter[tuple[StageName, Reason]]:
        """The failed rows by what failed them."""
        return Counter(
            {(stage, reason): rows for stage, tally in self.tallies.items() for reason, rows in tally.failed_by.items()}
        )

    def slowest(self) -> tuple[StageName, float] | None:
        """The stage that the workers spent the most time in, and its share of all their time; None before any work."""
        busy_s = {stage: tally.busy_s for stage, tally in self.tallies.items()}
        if not any(busy_s.values()):
            return None
        stage = max(busy_s, key=busy_s.__getitem__)
        return stage, busy_s[stage] / sum(busy_s.values())


def say(step: str) -> None:
    """A step that takes a while, as a line."""
    print(step, flush=True)


@contextmanager
def in_background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs `work` in a thread; when the block ends, its event is set, and it is waited for."""
    finished = threading.Event()
    thread = threading.Thread(target=work, args=(finished,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


@contextmanager
def shown(phase: Phase, look: Callable[[], Done]) -> Iterator[None]:
    """Shows progress in the background until the block ends."""
    console = Console(stderr=True)
    started = time.monotonic()

    def elapsed_s() -> float:
        return time.monotonic() - started

    def refresh_live(finished: threading.Event) -> None:
        with Live(display(phase, look(), elapsed_s()), console=console, auto_refresh=False) as live:
            while not finished.wait(REFRESH_S):
                live.update(display(phase, look(), elapsed_s()), refresh=True)
            live.update(display(phase, look(), elapsed_s()), refresh=True)

    def print_lines(finished: threading.Event) -> None:
        ended = False
        while not ended:
            console.print(line(phase, look(), elapsed_s()), highlight=False, soft_wrap=True)
            ended = finished.wait(pause_s(elapsed_s()))
        console.print(line(phase, look(), elapsed_s()), highlight=False, soft_wrap=True)

    with in_background(refresh_live if console.is_terminal else print_lines):
        yield
    for warning in halvings(look().tallies):
        console.print(warning, style="yellow", highlight=False, soft_wrap=True)


def pause_s(elapsed_s: float) -> float:
    """Seconds until the next line of a log."""
    least, most = PLAIN_REFRESH_S
    return min(max(least, PLAIN_REFRESH_SHARE * elapsed_s), most)


def halvings(tallies: Mapping[StageName, Tally]) -> Iterator[str]:
    """A line for each stage whose batches failed as a whole more than once and went through in parts: the data is
    whole, but the time is lost at every such batch."""
    for stage, tally in tallies.items():
        if tally.halved > 1:
            yield (
                f"{stage.value}: {tally.halved} of {tally.batches} batches failed as a whole and went through in "
                f"smaller ones, which takes longer; a smaller {stage.value}.micro_batch may avoid it "
                f"({tally.halved_by})"
            )


def record(
    store: Store, tallies: Mapping[StageName, Tally], elapsed_s: float, nodes: Sequence[tuple[float, float]]
) -> None:
    """Adds a phase to the folder's record of how long each phase and its stages took. `nodes`: CPUs and GPUs of each
    machine that there was."""
    stages = {stage.value: dataclasses.asdict(tally) for stage, tally in tallies.items()}
    told = {"elapsed_s": elapsed_s, "stages": stages, "nodes": nodes}
    before = store.read(THROUGHPUT_FILE) if store.exists(THROUGHPUT_FILE) else b""
    store.put(THROUGHPUT_FILE, before + json.dumps(told).encode() + b"\n")


def display(phase: Phase, done: Done, elapsed_s: float) -> Group:
    """Not wider than 40 columns, up to 999,999 rows."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("stage", "rows", "kept", "dropped", "failed"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage, tally, _ in flow(phase, done):
        counts = (tally.rows, tally.rows - tally.dropped - tally.failed, tally.dropped, tally.failed)
        table.add_row(stage.value, *(f"{count:,}" for count in counts))
    where, how_fast = _heading(phase, done, elapsed_s)
    return Group(Text(where, "bold"), Text(how_fast), table)


def line(phase: Phase, done: Done, elapsed_s: float) -> str:
    """The same as a line of a log."""
    stages = [
        f"{stage.value} {tally.rows:,}/{expected:,} (-{tally.dropped + tally.failed:,})"
        for stage, tally, expected in flow(phase, done)
    ]
    return f"{', '.join(_heading(phase, done, elapsed_s))}; {', '.join(stages)}"


def _heading(phase: Phase, done: Done, elapsed_s: float) -> tuple[str, str]:
    where = f"phase {phase.number} of {phase.of}: {phase.shards_before + done.shards:,}/{phase.shards:,} shards"
    if not done.tallies:
        return where, "starting workers, which load the models" if phase.stage_s else "starting workers"
    left = left_s(phase, done, elapsed_s)
    return where, f"{rows_per_s(phase, done, elapsed_s):.1f} rows/s, {_clock(left)} left"


def rows_per_s(phase: Phase, done: Done, elapsed_s: float) -> float:
    """How fast rows come to the last stage."""
    *_, (_, last, _) = flow(phase, done)
    return last.rows / max(elapsed_s, 1e-9)


def left_s(phase: Phase, done: Done, elapsed_s: float) -> float | None:
    """Seconds until the run's end, later phases included; None where nothing can be said yet.

    What is left in each stage costs a worker what it did so far, or else what is expected; and as many workers of a
    team are at work as were on average.
    """
    remaining_s: dict[StageName, float] = {}
    kept = phase.rows
    for stage, tally, expected in flow(phase, done):
        each_s = tally.busy_s / tally.rows if tally.rows else phase.stage_s.get(stage, 0.0)
        remaining_s[stage] = max(expected - tally.rows, 0) * each_s
        kept = _kept(tally, expected)
    slowest_s = 0.0
    for team in phase.teams:
        busy_s = sum(done.tallies[stage].busy_s for stage in team if stage in done.tallies)
        if not busy_s:
            return None
        slowest_s = max(slowest_s, sum(remaining_s[stage] for stage in team) * elapsed_s / busy_s)
    return slowest_s + kept * phase.later_row_s


def flow(phase: Phase, done: Done) -> Iterator[tuple[StageName, Tally, int]]:
    """Each stage, what it did, and how many rows it can expect: those that the earlier stages let through."""
    rows = phase.rows
    for stage in phase.stages:
        rows += phase.joining.get(stage, 0)
        tally = done.tallies.get(stage, Tally())
        yield stage, tally, rows
        rows = _kept(tally, rows)


def _kept(tally: Tally, rows: int) -> int:
    """How many of the rows a stage will keep, if it goes on as so far."""
    share = (tally.rows - tally.dropped - tally.failed) / tally.rows if tally.rows else 1.0
    return round(rows * share)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
