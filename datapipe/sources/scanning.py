"""What is shown while a long input is looked through, before the run itself has anything to show."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.status import Status

Item = TypeVar("Item")

QUIET_S = 2.0
"""Seconds after which a scan begins to show how far it is."""
LIVE_S, PLAIN_S = 0.5, 10.0
"""Seconds between two updates, in a terminal and in a log file."""


def shown(items: Iterable[Item], what: str) -> Iterator[Item]:
    """The same items. While they take long, how many there were is shown on stderr: "120,000 rows read"."""
    console: Console | None = None
    status: Status | None = None
    started = time.monotonic()
    due = started + QUIET_S
    try:
        for count, item in enumerate(items, 1):
            yield item
            if time.monotonic() < due:
                continue
            if console is None:
                console = Console(stderr=True)
                if not console.is_terminal:
                    due = started + PLAIN_S
                    continue
            line = f"input: {count:,} {what}, {count / (time.monotonic() - started):,.0f}/s"
            if not console.is_terminal:
                console.print(line, highlight=False)
            elif status is None:
                status = console.status(line)
                status.start()
            else:
                status.update(line)
            due = time.monotonic() + (LIVE_S if console.is_terminal else PLAIN_S)
    finally:
        if status is not None:
            status.stop()
