"""What is put aside on disk is gone afterwards, and a full disk is one line."""

from __future__ import annotations

import contextlib
import os
import sqlite3

import pytest

from datapipe.sources.temporary_database import temporary_database
from subject_diffusion.errors import RunError

ROWS = 100_000
OPEN_FILES = "/proc/self/fd"


def on_disk() -> list[str]:
    """SQLite's temporary files that this process has open."""
    found = []
    for number in os.listdir(OPEN_FILES):
        with contextlib.suppress(FileNotFoundError):  # that of this listing itself
            found.append(os.readlink(f"{OPEN_FILES}/{number}"))
    return [name for name in found if "/etilqs_" in name]


@pytest.mark.skipif(not os.path.isdir(OPEN_FILES), reason="open files are listed on Linux alone")
def test_what_is_large_lies_on_disk_and_leaves_nothing_behind() -> None:
    with temporary_database() as database:
        database.execute("CREATE TABLE names (name)")
        database.execute("INSERT INTO names VALUES ('a')")
        assert not on_disk()
        database.executemany("INSERT INTO names VALUES (?)", ((f"{n:0100}",) for n in range(ROWS)))
        (name,) = on_disk()
        assert name.endswith("(deleted)"), "not even a process that is killed leaves it behind"
    assert not on_disk()


def test_a_full_disk_is_one_line() -> None:
    def fill() -> None:
        with temporary_database() as database:
            database.execute("CREATE TABLE names (name)")
            database.execute("PRAGMA max_page_count = 10")  # as a full disk answers
            database.executemany("INSERT INTO names VALUES (?)", ((f"{n:0100}",) for n in range(ROWS)))

    with pytest.raises(RunError, match="TMPDIR"):
        fill()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(sqlite3.OperationalError, match="no such table"), temporary_database() as database:
        database.execute("SELECT * FROM nowhere")
