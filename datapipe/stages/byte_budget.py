"""A bound on the bytes that downloads side by side hold together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

Take = Callable[[int, float], None]
"""Takes so many bytes, and waits for them for so many seconds at most. Raises TimeoutError."""


class ByteBudget:
    """`total`: bytes. A download that would exceed them waits until others end; the one that began first never does, so
    that there is always one that goes on. What is held in all is thus at most `total` and one download."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._taken: dict[object, int] = {}
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def download(self) -> Iterator[Take]:
        """Gives what is to be called before more bytes are held. All are free again when the block ends."""
        download = object()

        def is_first() -> bool:
            return next(iter(self._taken)) is download

        def take(count: int, most_s: float) -> None:
            with self._freed:
                if not self._freed.wait_for(lambda: count <= self._left or is_first(), most_s):
                    raise TimeoutError
                self._left -= count
                self._taken[download] += count

        with self._freed:
            self._taken[download] = 0
        try:
            yield take
        finally:
            with self._freed:
                self._left += self._taken.pop(download)
                self._freed.notify_all()
