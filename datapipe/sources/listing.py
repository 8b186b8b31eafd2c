"""What an input path stands for: the tables, tars and lists of URLs, of which there may be millions."""

from __future__ import annotations

import difflib
import itertools
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any

from fsspec.core import has_magic
from fsspec.utils import glob_translate

from datapipe.sources.compression import COMPRESSED_SUFFIXES
from datapipe.sources.input_files import (
    LIST_SUFFIX,
    TABLE_SUFFIXES,
    TAR_SUFFIX,
    InputFile,
    input_file_of,
    input_file_system,
    suffix_of,
    url_of,
)
from datapipe.sources.path_table import PathTable
from datapipe.sources.scanning import shown
from datapipe.sources.store_listing import Info, entries, files_below, is_folder
from datapipe.sources.tar_keys import IMAGE_ENDINGS
from datapipe.sources.temporary_database import temporary_database
from subject_diffusion.errors import SourceError

_NEIGHBORS = 1000
"""Names among which one is looked for that the user may have meant."""


@dataclass(frozen=True)
class InputFiles:
    """Files of an input, in a database. Iterates over them by name, and reads them anew each time."""

    database: Connection
    conditions: tuple[Callable[[InputFile], bool], ...] = ()

    def __iter__(self) -> Iterator[InputFile]:
        rows = self.database.execute("SELECT url, name, size, version FROM files ORDER BY name")
        return (file for file in map(_file, rows) if all(holds(file) for holds in self.conditions))

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def only(self, condition: Callable[[InputFile], bool]) -> InputFiles:
        return InputFiles(self.database, (*self.conditions, condition))

    def first(self) -> InputFile:
        """Raises StopIteration where there is none."""
        return next(iter(self))


@dataclass(frozen=True)
class Listing:
    """`root`: the folder that names are relative to; `files`: tables, tars and lists of URLs; `images`: how many images
    lie beside them."""

    path: str
    root: str
    is_folder: bool
    files: InputFiles
    images: int = 0

    def named(self, name: str) -> InputFile | None:
        query = "SELECT url, name, size, version FROM files WHERE name = ?"
        row = self.files.database.execute(query, (os.fsencode(name),)).fetchone()
        return None if row is None else _file(row)

    def image_ending(self, folder: str) -> str | None:
        """The ending, in lower case, of the first image in a folder, which is relative to the root."""
        query = "SELECT min(name) FROM pictures WHERE name > ? AND name < ?"
        (name,) = self.files.database.execute(query, (os.fsencode(f"{folder}/"), os.fsencode(f"{folder}0"))).fetchone()
        return None if name is None else suffix_of(os.fsdecode(name))[1:]

    def beside(self, files: InputFiles, suffix: str) -> Callable[[str], InputFile | None]:
        """Finds, by the name of one of these files, that of the same name but for its suffix, such as 0.parquet for
        0.tar.gz. Hidden ones, and those of a web server, which lists nothing, are left out."""
        if not self.is_folder:
            self._add_neighbors(files)

        def find(name: str) -> InputFile | None:
            stem, last = os.path.splitext(name)
            plain = stem if last.lower() in COMPRESSED_SUFFIXES else name
            wanted = os.path.splitext(plain)[0] + suffix
            found = self.files.database.execute(
                "SELECT url, name, size, version FROM neighbors WHERE name = ?", (os.fsencode(wanted),)
            ).fetchone()
            return self.named(wanted) if found is None else _file(found)

        return find

    def _add_neighbors(self, files: InputFiles) -> None:
        database = self.files.database
        _, root = input_file_system(self.root)
        folders = PathTable(database)
        folders.add(posixpath.dirname(file.url) for file in files if not file.url.startswith("http"))
        for folder in folders:
            fs, inner = input_file_system(folder)
            found = (input_file_of(fs, root, info) for info in entries(fs, inner))
            rows = (_row(file) for file in found if file is not None)
            database.executemany("INSERT OR REPLACE INTO neighbors VALUES (?, ?, ?, ?)", rows)


@contextmanager
def list_files(path: str) -> Iterator[Listing]:
    """The file itself, the files in a folder and below it (but hidden and `_` ones), or those that match a glob."""
    fs, inner = input_file_system(path)
    with temporary_database() as database:
        database.execute("CREATE TABLE pictures (name PRIMARY KEY, stem) WITHOUT ROWID")
        database.execute("CREATE TABLE files (url, name PRIMARY KEY, size, version, stem) WITHOUT ROWID")
        database.execute("CREATE TABLE neighbors (url, name PRIMARY KEY, size, version) WITHOUT ROWID")
        if is_folder(fs, inner):
            below = shown(files_below(fs, inner, is_hidden), "files looked through")
            yield _listing(path, database, fs, inner, below, of_folder=True)
        elif fs.exists(inner):
            yield _listing(path, database, fs, fs._parent(inner), [fs.info(inner)])
        elif has_magic(inner):
            root = _fixed_part(inner)
            matching = shown(_matching(fs, root, inner), "files looked through")
            first = next(matching, None)
            if first is None:
                raise SourceError(
                    f"input {path}: no file matches; check the pattern (quote it, so that the shell leaves it alone)"
                )
            yield _listing(path, database, fs, root, itertools.chain([first], matching))
        else:
            raise SourceError(f"input {path}: no such file or folder{_neighbor(fs, inner)}; check the path")


def _listing(
    path: str, database: Connection, fs: Any, root: str, infos: Iterable[Info], of_folder: bool = False
) -> Listing:
    for info in infos:
        suffix = suffix_of(info["name"])
        is_picture = suffix[1:] in IMAGE_ENDINGS
        is_list = suffix == LIST_SUFFIX and not of_folder
        if not (is_picture or is_list or suffix in (*TABLE_SUFFIXES, TAR_SUFFIX)):
            continue
        file = input_file_of(fs, root, info)
        if file is None:
            continue
        stem = os.fsencode(os.path.splitext(file.name)[0])
        if is_picture:
            database.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?)", (os.fsencode(file.name), stem))
        else:
            database.execute("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?)", (*_row(file), stem))
    (images,) = database.execute("SELECT count(*) FROM pictures").fetchone()
    if of_folder:  # a text or a json of an image's own name says something of that image, and is no table
        database.execute("DELETE FROM files WHERE stem IN (SELECT stem FROM pictures)")
    return Listing(path, url_of(fs, root), of_folder, InputFiles(database), images)


def is_hidden(name: str) -> bool:
    """Hidden files, marks such as `_SUCCESS`, and what file managers leave."""
    return name.startswith((".", "_")) or name == "@eaDir"


def _matching(fs: Any, root: str, pattern: str) -> Iterator[Info]:
    """The files that match a glob, as fsspec has it, with `root` the part of it before the first special character."""
    matches = re.compile(glob_translate(pattern)).match
    depth = None if "**" in pattern else pattern.removeprefix(root.rstrip("/")).strip("/").count("/") + 1
    if is_folder(fs, root):
        below = files_below(fs, root, lambda name: False, depth, follow_links=True)
        yield from (info for info in below if matches(info["name"]))


def _row(file: InputFile) -> tuple[object, ...]:
    """Names as bytes, because they need not be UTF-8."""
    return os.fsencode(file.url), os.fsencode(file.name), file.size, file.version


def _file(row: tuple[Any, ...]) -> InputFile:
    url, name, size, version = row
    return InputFile(os.fsdecode(url), os.fsdecode(name), size, version)


def _fixed_part(pattern: str) -> str:
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if has_magic(part))
    return "/".join(parts[:fixed]) or "/"


def _neighbor(fs: Any, inner: str) -> str:
    """The most similar name in the same folder, when there is one."""
    try:
        inside = itertools.islice(entries(fs, fs._parent(inner)), _NEIGHBORS)
        names = [os.path.basename(info["name"].rstrip("/")) for info in inside]
    except OSError:
        return ""
    near = difflib.get_close_matches(os.path.basename(inner), names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
