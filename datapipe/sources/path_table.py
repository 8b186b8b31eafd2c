"""Paths in order, however many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from sqlite3 import Connection

from datapipe.sources.temporary_database import temporary_database


class PathTable:
    """A set of paths, in a database. Iterates in the order of their parts: `a/b` comes before `a.b`."""

    def __init__(self, database: Connection) -> None:
        self._database = database
        self._database.execute("CREATE TABLE paths (place PRIMARY KEY) WITHOUT ROWID")

    def add(self, paths: Iterable[str]) -> None:
        self._database.executemany("INSERT OR IGNORE INTO paths VALUES (?)", ((place_of(path),) for path in paths))

    def __iter__(self) -> Iterator[str]:
        for (place,) in self._database.execute("SELECT place FROM paths ORDER BY place"):
            yield path_of(place)

    def __contains__(self, path: str) -> bool:
        found = self._database.execute("SELECT 1 FROM paths WHERE place = ?", (place_of(path),))
        return found.fetchone() is not None

    def __bool__(self) -> bool:
        return self._database.execute("SELECT 1 FROM paths LIMIT 1").fetchone() is not None


@contextmanager
def path_table() -> Iterator[PathTable]:
    """An empty one, gone afterwards. Raises RunError where there is no room for it."""
    with temporary_database() as database:
        yield PathTable(database)


def place_of(path: str) -> bytes:
    """What sorts as the parts of the path do. Names need not be UTF-8."""
    return path.replace("/", "\0").encode("utf-8", "surrogatepass")


def path_of(place: bytes) -> str:
    """Inverse of `place_of`."""
    return place.decode("utf-8", "surrogatepass").replace("\0", "/")
