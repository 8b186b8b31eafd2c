"""What a run tells of itself while it works: a file in its folder, from which any shell can say it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from datapipe.progress import Done, Phase, in_background, say
from datapipe.shards import Store
from subject_diffusion.errors import RunError, SddError, ShardError

STATUS_FILE = "status.json"
"""There while a run is at work, and after one that was killed. Nothing but `sdd status` reads it."""
TELL_S = 5.0
"""Seconds between two looks at what has changed."""

Listener = Callable[[Done, float], None]
"""Is told what a phase has done, and how many seconds that took."""


@dataclass(frozen=True)
class Status:
    """`told_at`: seconds since 1970. `step`: what the run is doing; `phase` and what follows: where that is a phase."""

    told_at: float
    step: str
    phase: Phase | None = None
    done: Done = field(default_factory=Done)
    elapsed_s: float = 0.0


_IN_JSON = TypeAdapter(Status)


def begin(store: Store, step: str) -> None:
    """Says what the run does next, on the screen and in the folder."""
    say(step)
    _put(store, Status(time.time(), step))


def in_folder(store: Store, phase: Phase) -> Listener:
    """Keeps the folder's status up to date."""
    step = f"phase {phase.number} of {phase.of}"
    return lambda done, elapsed_s: _put(store, Status(time.time(), step, phase, done, elapsed_s))


def read_status(store: Store) -> Status | None:
    """What a run told last; None where none is at work. Raises ShardError."""
    try:
        return _IN_JSON.validate_json(store.read(STATUS_FILE))
    except RunError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    except ValidationError:
        raise ShardError(f"{store.root}/{STATUS_FILE}: not what a run of this release tells; remove it") from None


@contextmanager
def telling(look: Callable[[], Done], *listeners: Listener) -> Iterator[None]:
    """Tells the listeners in the background what is done, whenever that has changed, until the block ends."""
    started = time.monotonic()

    def tell(finished: threading.Event) -> None:
        told: Done | None = None
        ended = False
        while True:
            if (done := look()) != told:
                for listener in listeners:
                    listener(done, time.monotonic() - started)
                told = done
            if ended:
                return
            ended = finished.wait(TELL_S)

    with in_background(tell):
        yield


def _put(store: Store, status: Status) -> None:
    # A run does not need its status; what it does need will tell of the disk that is full.
    with suppress(SddError):
        store.put(STATUS_FILE, _IN_JSON.dump_json(status) + b"\n")
