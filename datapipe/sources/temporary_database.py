"""Room on disk for what is too much to hold: what has to be sorted, grouped or joined before the first row is known."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager


@contextmanager
def temporary_database() -> Iterator[sqlite3.Connection]:
    """A database of one's own that is gone afterwards. A small one never leaves the memory; of a large one, about 2 MB
    are held, and the rest lies where temporary files do (TMPDIR)."""
    with closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as database:
        database.execute("PRAGMA journal_mode = OFF")  # nobody goes back, or reads it after a crash
        database.execute("BEGIN")
        yield database
