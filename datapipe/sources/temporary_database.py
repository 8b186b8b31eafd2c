"""Room on disk for what is too much to hold: what has to be sorted, grouped or joined before the first row is known."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

from subject_diffusion.storage import no_room

_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_PRIMARY = 0xFF
"""The bits of SQLite's error codes that say which error it is, and not of which sort."""


@contextmanager
def temporary_database() -> Iterator[sqlite3.Connection]:
    """A database of one's own that is gone afterwards. A small one never leaves the memory; of a large one, about 2 MB
    are held, and the rest lies in TMPDIR, by default /var/tmp. Raises RunError where there is no room."""
    with closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as database:
        database.execute("PRAGMA journal_mode = OFF")  # nobody goes back, or reads it after a crash
        database.execute("BEGIN")
        try:
            yield database
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & _PRIMARY not in _NO_ROOM:
                raise
            raise no_room(error) from None
