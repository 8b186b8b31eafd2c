"""The folder that an export fills: there whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from datapipe.shards import Store
from subject_diffusion.errors import RunError
from subject_diffusion.storage import PARTIAL, file_system, is_local, named_errors, whole_file

_TAKEN = "holds files already; name a new folder"


class ExportFolder:
    """`place`: its path or URL once it is whole, as programs elsewhere can open it."""

    def __init__(self, place: str, fs: Any, path: str) -> None:
        """fs, path: fsspec's file system, and where in it files are written."""
        self.place = place
        self._fs = fs
        self._path = path

    def put(self, name: str, data: bytes) -> str:
        """Writes a file, whose name may begin with a folder; returns the name."""
        with self.writing(name) as file:
            file.write(data)
        return name

    @contextlib.contextmanager
    def lines(self, name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
        """What adds objects to a file of JSON lines."""
        with self.writing(name) as file:
            yield lambda tree: _write_line(file, tree)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A file that is written bit by bit, whose name may begin with a folder."""
        path = f"{self._path}/{name}"
        with named_errors(f"{self.place}/{name}", RunError):
            if is_local(self._fs):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    yield file
            else:
                with whole_file(path, self._fs) as file:
                    yield file


@contextlib.contextmanager
def new_folder(out: str) -> Iterator[ExportFolder]:
    """A folder to fill, which appears at `out` when the block ends well. A bucket renames no folder: there files appear
    one by one, so that what a trainer opens first is to be written last. Raises RunError where something is already.
    """
    fs, path = file_system(out, RunError)
    if not is_local(fs):
        if Store(out).names():
            raise RunError(f"{out}: {_TAKEN}")
        yield ExportFolder(out.rstrip("/"), fs, path.rstrip("/"))
        return
    target = Path(os.path.realpath(path))
    if os.path.ismount(target):
        raise RunError(f"{out}: a mounted disk, in whose place no folder can be put; name a folder in it")
    partial = target.with_name(PARTIAL + target.name)
    with named_errors(out, RunError):
        if target.exists() and any(target.iterdir()):
            raise RunError(f"{out}: {_TAKEN}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield ExportFolder(str(target), fs, str(partial))
        with named_errors(out, RunError):
            os.sync()  # once, because files may be millions
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_line(file: IO[bytes], tree: dict[str, Any]) -> None:
    file.write((json.dumps(tree, ensure_ascii=False) + "\n").encode())
