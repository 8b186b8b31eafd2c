"""A dataset folder, local or in an object store, in which files appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import fsspec

from datapipe.errors import RunError, SddError

_TEMPORARY = re.compile(r"\.[^/]+\.tmp-\d+-[0-9a-f]{8}$")
LOCK_FILE = ".lock"
RUN_FILE = "run.json"
"""What the folder is for: the recipe and the input of its run."""
_STORE_CLIENTS = {"botocore", "aiobotocore", "s3fs", "gcsfs", "google", "aiohttp"}


class Store:
    """`root`: a path, or a URL that fsspec knows (s3://, gs://); `url`: the same from any working directory.

    Errors of the file system come out as RunError.
    """

    def __init__(self, root: str, create: bool = True) -> None:
        self.root = root.rstrip("/")
        with self._named_errors(""):
            try:
                self._fs, self._path = fsspec.core.url_to_fs(self.root)
            except ValueError as error:
                raise RunError(f"{root}: {error}; use a path, s3:// or gs://") from None
            self.protocol = self._fs.protocol if isinstance(self._fs.protocol, str) else self._fs.protocol[0]
            self.local = self.protocol == "file"
            self.url = self._path if self.local else self.root
            if self.local and create:
                Path(self._path).mkdir(parents=True, exist_ok=True)
            elif not create and not self._fs.exists(self._path):
                raise RunError(f"{root}: no such folder")

    def exists(self, name: str) -> bool:
        with self._named_errors(name):
            return bool(self._fs.exists(self.path_of(name)))

    def read(self, name: str, offset: int | None = None, size: int | None = None) -> bytes:
        """The whole file, or `size` bytes from `offset`."""
        with self._named_errors(name):
            end = None if offset is None or size is None else offset + size
            return bytes(self._fs.cat_file(self.path_of(name), start=offset, end=end))

    def open(self, name: str) -> IO[bytes]:
        """For reading, seekable."""
        with self._named_errors(name):
            opened: IO[bytes] = self._fs.open(self.path_of(name), "rb")
            return opened

    def names(self) -> list[str]:
        """The files directly in the folder, sorted; without temporary ones."""
        with self._named_errors(""):
            self._fs.invalidate_cache()
            listed = self._fs.ls(self._path, detail=False) if self._fs.exists(self._path) else []
        return sorted(n for n in (str(p).rsplit("/", 1)[-1] for p in listed) if not _TEMPORARY.search(n))

    def put(self, name: str, data: bytes) -> None:
        with self.writing(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[HashingFile]:
        """A file to write to, which appears under its name when the block ends well, and else leaves nothing behind."""
        folder = self._path if self.local else tempfile.gettempdir()
        temporary = Path(folder) / f".{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        with self._named_errors(name):
            try:
                with temporary.open("wb") as file:
                    yield HashingFile(file)
                    file.flush()
                    os.fsync(file.fileno())
                if self.local:
                    os.replace(temporary, self.path_of(name))
                    self._sync_folder()
                else:
                    self._fs.put_file(str(temporary), self.path_of(name))
            finally:
                temporary.unlink(missing_ok=True)

    def temporaries(self) -> list[str]:
        """What killed writers left, or others are writing. Only names of our own making, and only in local folders."""
        if not self.local:
            return []
        return sorted(path.name for path in Path(self._path).iterdir() if _TEMPORARY.search(path.name))

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

    def path_of(self, name: str) -> str:
        """As fsspec's file system of `protocol` knows it."""
        return f"{self._path}/{name}" if name else self._path

    def _sync_folder(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

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


@contextlib.contextmanager
def named_errors(path: str, kind: type[SddError]) -> Iterator[None]:
    """Errors of a file system, local or remote, as one line that names the path."""
    try:
        yield
    except (OSError, ImportError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise kind(f"{path}: {what or type(error).__name__}") from error
    except Exception as error:
        # Object stores raise their client's own classes (botocore's, google's) for missing credentials and the like.
        if type(error).__module__.split(".")[0] not in _STORE_CLIENTS:
            raise
        raise kind(f"{path}: {' '.join(str(error).split())[:200]}") from error
