"""Whose turn it is to be asked: few visits at once with one address, and none before its time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush

from datapipe.schema import Sample
from datapipe.stages.addresses import Address
from datapipe.stages.urls import target


class Visit:
    """A row on its way to its image.

    order: its place among all visits.
    key: what the next step asks: a host whose address is to be looked up, or an address.
    left_s: what is left of the row's time, in seconds. Waiting for its turn takes none of it.
    addresses: of the URL's host, best first; none: not looked up yet.
    not_before: when the next step may be taken, in seconds of the monotonic clock.
    postponed: it took longer than its share, and begins again after all that were not asked yet.
    """

    def __init__(self, sample: Sample, order: int, url: str, share_s: float) -> None:
        self.sample = sample
        self.order = order
        self.share_s = self.left_s = share_s
        self.attempt = 0
        self.not_before = 0.0
        self.postponed = False
        self._begin(url)

    def _begin(self, url: str) -> None:
        self.redirects = 0
        self._aim(url)

    def _aim(self, url: str) -> None:
        self.url = url
        self.key = target(url).host
        self.addresses: Sequence[Address] = ()

    def found(self, addresses: Sequence[Address]) -> None:
        self.addresses = addresses
        self.key = addresses[0].key

    def redirect(self, url: str) -> None:
        self.redirects += 1
        self._aim(url)

    def retry(self, url: str, pause_s: float) -> None:
        """From the first URL, after a pause, which takes from the row's time."""
        self.attempt += 1
        self.left_s -= pause_s
        self.not_before = time.monotonic() + pause_s
        self._begin(url)

    def postpone(self, url: str, seconds: float) -> None:
        """From the first URL, with so much time, after all others."""
        self.postponed = True
        self.left_s = seconds
        self._begin(url)


def take_turns(visits: Sequence[Visit], step: Callable[[Visit], bool], *, threads: int, per_key: int) -> None:
    """Takes steps with each visit, in `threads` threads, until `step` says that there is no further one. Between two
    steps a visit may have got another `key`, `not_before` or `postponed`. At most `per_key` steps with one key are
    taken at once."""
    turns = _Turns(visits, per_key)
    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        lanes = [pool.submit(turns.work, step) for _ in range(min(threads, len(visits)))]
    for lane in lanes:
        lane.result()


class _Turns:
    def __init__(self, visits: Sequence[Visit], per_key: int) -> None:
        self._per_key = per_key
        self._changed = threading.Condition()
        self._open = len(visits)
        self._active: Counter[str] = Counter()
        self._ready: list[tuple[bool, int, Visit]] = []
        self._waiting: dict[str, list[tuple[bool, int, Visit]]] = {}
        self._paused: list[tuple[float, int, Visit]] = []
        for visit in visits:
            self._put(visit)

    def work(self, step: Callable[[Visit], bool]) -> None:
        while (visit := self._next()) is not None:
            key = visit.key
            try:
                goes_on = step(visit)
            except BaseException:
                with self._changed:
                    self._open = 0  # so that no thread waits for this one
                    self._changed.notify_all()
                raise
            with self._changed:
                self._release(key)
                if goes_on:
                    self._put(visit)
                else:
                    self._open -= 1
                    if not self._open:
                        self._changed.notify_all()

    def _next(self) -> Visit | None:
        with self._changed:
            while self._open > 0:
                now = time.monotonic()
                while self._paused and self._paused[0][0] <= now:
                    self._put(heappop(self._paused)[-1])
                if self._ready:
                    visit = heappop(self._ready)[-1]
                    if self._ready:
                        self._changed.notify()  # one wakes the next: all at once would be in each other's way
                    return visit
                self._changed.wait(self._paused[0][0] - now if self._paused else None)
        return None

    def _put(self, visit: Visit) -> None:
        if visit.not_before > time.monotonic():
            heappush(self._paused, (visit.not_before, visit.order, visit))
            self._changed.notify()  # a thread that waits may have to wake earlier
        elif self._active[visit.key] < self._per_key:
            self._active[visit.key] += 1
            heappush(self._ready, (visit.postponed, visit.order, visit))
        else:
            heappush(self._waiting.setdefault(visit.key, []), (visit.postponed, visit.order, visit))

    def _release(self, key: str) -> None:
        if waiting := self._waiting.get(key):
            heappush(self._ready, heappop(waiting))
        else:
            self._waiting.pop(key, None)
            self._active[key] -= 1
            if not self._active[key]:
                del self._active[key]
