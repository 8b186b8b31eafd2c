"""What a run shows while it works: a line per stage with rows/s, kept, dropped and the time left."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from datapipe.isolation import Tally
from datapipe.schema import StageName
from datapipe.shards import Store

REFRESH_S = 0.5
THROUGHPUT_FILE = "throughput.jsonl"
"""A line for every phase that ended well: no shard depends on it."""
PLAIN_REFRESH_S = 10.0
"""Between lines where the output is no terminal, a log file say."""


@contextmanager
def shown(stages: Sequence[StageName], rows: int, tallies: Callable[[], Mapping[StageName, Tally]]) -> Iterator[None]:
    """Shows progress in the background until the block ends. `rows`: that will enter the first stage."""
    console = Console(stderr=True)
    started = time.monotonic()
    finished = threading.Event()

    def table() -> Table:
        return _table(stages, rows, tallies(), time.monotonic() - started)

    def refresh_live() -> None:
        with Live(table(), console=console, auto_refresh=False) as live:
            while not finished.wait(REFRESH_S):
                live.update(table(), refresh=True)
            live.update(table(), refresh=True)

    def print_lines() -> None:
        while not finished.wait(PLAIN_REFRESH_S):
            console.print(_line(stages, rows, tallies(), time.monotonic() - started))
        console.print(_line(stages, rows, tallies(), time.monotonic() - started))

    thread = threading.Thread(target=refresh_live if console.is_terminal else print_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def record(store: Store, tallies: Mapping[StageName, Tally], elapsed_s: float) -> None:
    """Adds to the folder's record how long a phase and its stages took."""
    stages = {stage.value: dataclasses.asdict(tally) for stage, tally in tallies.items()}
    before = store.read(THROUGHPUT_FILE) if store.exists(THROUGHPUT_FILE) else b""
    store.put(THROUGHPUT_FILE, before + json.dumps({"elapsed_s": elapsed_s, "stages": stages}).encode() + b"\n")


def _table(stages: Sequence[StageName], rows: int, tallies: Mapping[StageName, Tally], elapsed_s: float) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "", "rows", "kept", "dropped", "failed", "rows/s", "left"):
        table.add_column(heading, justify="left" if heading in ("stage", "") else "right")
    for stage, tally, expected in _flow(stages, rows, tallies):
        table.add_row(
            stage.value,
            ProgressBar(total=max(expected, 1), completed=tally.rows, width=24),
            f"{tally.rows:,}",
            f"{tally.rows - tally.dropped - tally.failed:,}",
            f"{tally.dropped:,}",
            f"{tally.failed:,}",
            f"{tally.rows / elapsed_s:.1f}" if elapsed_s else "",
            _time_left(tally.rows, expected, elapsed_s),
        )
    return table


def _line(stages: Sequence[StageName], rows: int, tallies: Mapping[StageName, Tally], elapsed_s: float) -> str:
    parts = [
        f"{stage.value} {tally.rows}/{expected} (-{tally.dropped + tally.failed})"
        for stage, tally, expected in _flow(stages, rows, tallies)
    ]
    *_, (_, last, expected) = _flow(stages, rows, tallies)
    left = _time_left(last.rows, expected, elapsed_s)
    return f"{'  '.join(parts)}  {last.rows / max(elapsed_s, 1e-9):.1f} rows/s  {left} left"


def _flow(
    stages: Sequence[StageName], rows: int, tallies: Mapping[StageName, Tally]
) -> Iterator[tuple[StageName, Tally, int]]:
    """Each stage, what it did, and how many rows it may still expect: those that the stages before it did not take."""
    for stage in stages:
        tally = tallies.get(stage, Tally())
        yield stage, tally, rows
        share_kept = (tally.rows - tally.dropped - tally.failed) / tally.rows if tally.rows else 1.0
        rows = round(rows * share_kept)


def _time_left(done: int, expected: int, elapsed_s: float) -> str:
    if not done:
        return "?"
    seconds = round(elapsed_s * max(expected - done, 0) / done)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
