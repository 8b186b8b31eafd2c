"""A dataset folder, local or in an object store, in which files appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from subject_diffusion.errors import RunError, SddError
from subject_diffusion.storage import file_system, is_local, is_temporary, named_errors, temporary_file, whole_file

LOCK_FILE = ".lock"
RUN_FILE = "run.json"
"""What the folder is for: the recipe and the input of its run."""
PROBE_FILE = ".writable"
"""There only while it is tried whether a file can be written."""
_PIECE = 8 << 20
"""Bytes that are copied at once."""


class Store:
    """`root`: a path, or a URL that fsspec knows (s3://, gs://); `url`: the same from any working directory.

    Errors of the file system come out as RunError.
    """

    def __init__(self, root: str, create: bool = True) -> None:
        self.root = root.rstrip("/")
        with self._named_errors(""):
            self._fs, self._path = file_system(self.root, RunError)
            self.local = is_local(self._fs)
            self.url = self._path if self.local else self.root
            if create and "hf" in self._fs.protocol:
                raise RunError(f"{root}: the hub is no place to write shards to; name a folder, then `hf upload` it")
            if self.local and create:
                Path(self._path).mkdir(parents=True, exist_ok=True)
            elif not create and not self._fs.exists(self._path):
                raise RunError(f"{root}: no such folder")

    def exists(self, name: str) -> bool:
        with self._named_errors(name):
            self._fs.invalidate_cache()  # of an earlier listing, since when it may have appeared
            return bool(self._fs.exists(self.path_of(name)))

    def read(self, name: str, offset: int | None = None, size: int | None = None) -> bytes:
        """Reads the whole file, or `size` bytes from `offset`."""
        with self._named_errors(name):
            end = None if offset is None or size is None else offset + size
            return bytes(self._fs.cat_file(self.path_of(name), start=offset, end=end))

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading, seekable."""
        with self._named_errors(name):
            opened: IO[bytes] = self._fs.open(self.path_of(name), "rb")
            return opened

    def local_file(self, name: str) -> IO[bytes]:
        """A file on this machine's disk, opened for reading: the store's own, or a temporary copy."""
        if self.local:
            with self._named_errors(name):
                return open(self.path_of(name), "rb")
        copy = temporary_file()
        with self._named_errors(name), self._fs.open(self.path_of(name), "rb") as original:
            shutil.copyfileobj(original, copy, _PIECE)
        copy.seek(0)
        return copy

    def names(self) -> list[str]:
        """The files directly in the folder, sorted; without temporary ones."""
        with self._named_errors(""):
            self._fs.invalidate_cache()
            listed = self._fs.ls(self._path, detail=False) if self._fs.exists(self._path) else []
        return sorted(n for n in (str(p).rsplit("/", 1)[-1] for p in listed) if not is_temporary(n))

    def put(self, name: str, data: bytes) -> None:
        with self.writing(name) as file:
            file.write(data)

    def remove(self, names: Iterable[str]) -> None:
        """Removes the files, those of them that are there."""
        for name in names:
            with self._named_errors(name), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self.path_of(name))

    def check_writable(self) -> None:
        """Writes a file and removes it. Raises RunError."""
        self.put(PROBE_FILE, b"")
        self.remove([PROBE_FILE])

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[HashingFile]:
        """A file to write to, which appears under its name when the block ends well, and else leaves nothing behind."""
        with self._named_errors(name), whole_file(self.path_of(name), self._fs) as file:
            yield HashingFile(file)

    def temporaries(self) -> list[str]:
        """What killed writers left, or others are writing. Only names of our own making, and only in local folders."""
        if not self.local:
            return []
        return sorted(path.name for path in Path(self._path).iterdir() if is_temporary(path.name))

    def clear_temporaries(self) -> list[str]:
        """Removes them, which is safe under the lock; returns their names."""
        names = self.temporaries()
        for name in names:
            (Path(self._path) / name).unlink(missing_ok=True)
        return names

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second run out of a local folder; the lock goes when this process does, however it ends."""
        if not self.local:
            yield
            return
        with self._named_errors(LOCK_FILE):
            file = (Path(self._path) / LOCK_FILE).open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.root}: another run is writing here; wait for it, or choose another OUT"
                ) from None
            yield

    @contextlib.contextmanager
    def as_it_was(self, *made: str) -> Iterator[None]:
        """A start that fails in this block, before the folder is claimed by its run.json, takes the files and folders
        `made` away again, where they were not there before, and the folder itself if that leaves it empty. Local
        folders only: elsewhere a listing may be stale."""
        made = tuple(name for name in made if self.local and not self.exists(name))
        try:
            yield
        except SddError:
            if self.local and not self.exists(RUN_FILE):
                for name in filter(self.exists, made):
                    self._fs.rm(self.path_of(name), recursive=True)
                if not self._fs.ls(self._path):
                    self._fs.rmdir(self._path)
            raise

    def path_of(self, name: str) -> str:
        """The path of a file, as `file_system` knows it."""
        return f"{self._path}/{name}" if name else self._path

    @property
    def file_system(self) -> Any:
        """fsspec's."""
        return self._fs

    def _named_errors(self, name: str) -> contextlib.AbstractContextManager[None]:
        return named_errors(f"{self.root}/{name}" if name else self.root, RunError)


class HashingFile:
    """A file for writing that knows its SHA-256 and size."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
