"""Retry-After: hosts that asked to be left alone for a while."""

from __future__ import annotations

import datetime
import threading
import time
from email.utils import parsedate_to_datetime

LONGEST_S = 24 * 3600.0
REMEMBERED_HOSTS = 10_000


def retry_after_s(value: str, now: datetime.datetime) -> float | None:
    """Retry-After, given in seconds or as a date, in seconds from now, at most `LONGEST_S`; None: it says nothing that
    can be read.

    now: aware of its time zone.
    """
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), LONGEST_S)
    try:
        until = parsedate_to_datetime(value)
        if until.tzinfo is None:  # "-0000", and dates without a zone
            until = until.replace(tzinfo=datetime.UTC)
        return min(max((until - now).total_seconds(), 0.0), LONGEST_S)
    except (ValueError, OverflowError):  # the last day of the year 9999 in a western zone, among others
        return None


class Pauses:
    """Until when each host is to be left alone, for all threads of a worker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}

    def ask(self, host: str, seconds: float) -> None:
        """The host asks for a pause; the longest one counts."""
        now = time.monotonic()
        with self._lock:
            if len(self._until) >= REMEMBERED_HOSTS:
                self._until = {name: until for name, until in self._until.items() if until > now}
            self._until[host] = max(self._until.get(host, 0.0), now + seconds)

    def left_s(self, host: str) -> float:
        with self._lock:
            return max(self._until.get(host, 0.0) - time.monotonic(), 0.0)
