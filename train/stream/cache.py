"""Shards on this machine's disk: local ones where they lie, remote ones in a bounded cache that processes share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

from datapipe.sources.tar_keys import KeyRule
from subject_diffusion.errors import RunError, SddError, ShardError
from subject_diffusion.storage import file_system, named_errors

CHUNK = 1 << 20
ATTEMPTS = 6
FIRST_WAIT_S = 0.5
"""Between the first two attempts at a download; then 1 s, 2 s, …"""
MOST_WAIT_S = 30.0


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _DamagedError(ShardError):
    """Bytes that are not those expected; of a download, the next one may be right."""


@dataclass(frozen=True)
class ShardFile:
    """A tar. `url`: path or URL; `size`: bytes; `sha256`: hex digest, None where no manifest says it; `key_rule`: where
    the keys of its members end."""

    url: str
    size: int
    sha256: str | None
    key_rule: KeyRule = "first_dot"

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def local(self) -> bool:
        return "://" not in self.url


class ShardCache:
    """Opens shards; downloads and checks them first where that has not been done.

    folder: shared by the processes of a machine. limit_bytes: of all downloads together; the least recently used go
    first. A shard in use may go, too: whoever has it open reads on.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owned(folder)
        self._remove_garbage()

    def open(self, shard: ShardFile) -> int:
        """A file descriptor for reading. Raises ShardError, which names the shard, when it cannot be had or its size or
        hash differ."""
        with named_errors(shard.url, ShardError):
            return self._open_local(shard) if shard.local else self._open_remote(shard)

    def _open_local(self, shard: ShardFile) -> int:
        descriptor = os.open(shard.url, os.O_RDONLY)
        try:
            self._check_local(shard, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if hasattr(os, "posix_fadvise"):  # macOS has none, and reads ahead by itself
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        return descriptor

    def _check_local(self, shard: ShardFile, descriptor: int) -> None:
        """Hashes a file once; a mark in the cache says that it was, and of which state of the file."""
        mark = self._path(shard, ".checked")
        state = os.fstat(descriptor)
        seen = f"{state.st_size} {state.st_mtime_ns} {state.st_ino}"
        if _is_marked(mark, seen):
            return
        with self._lock_of(mark):
            if not _is_marked(mark, seen):  # another process may have been faster
                _check(shard, descriptor)
                temporary = mark.with_suffix(".part")
                temporary.write_text(seen)
                temporary.replace(mark)

    def _open_remote(self, shard: ShardFile) -> int:
        path = self._path(shard, ".tar")
        with contextlib.suppress(FileNotFoundError):
            return self._open_cached(path)
        with self._lock_of(path):
            with contextlib.suppress(FileNotFoundError):  # another process may have been faster
                return self._open_cached(path)
            self._download(shard, path)
            descriptor = self._open_cached(path)
        self._evict()
        return descriptor

    def _open_cached(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        now = time.time_ns()  # the kernel's own stamps are milliseconds apart
        os.utime(descriptor, ns=(now, now))
        return descriptor

    def _download(self, shard: ShardFile, path: Path) -> None:
        part = path.with_suffix(".part")
        try:
            retried(_copy, shard, part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _evict(self) -> None:
        with FileLock(self.folder / "evict.lock"):
            files = []
            for path in self.folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            held = sum(size for _, size, _ in files)
            for _, size, path in sorted(files)[:-1]:
                if held <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                held -= size

    def _remove_garbage(self) -> None:
        """What a killed process left: parts whose lock nobody holds."""
        for part in self.folder.glob("*.part"):
            with contextlib.suppress(Timeout), self._lock_of(part, timeout=0):
                part.unlink(missing_ok=True)

    def _lock_of(self, path: Path, timeout: float = -1) -> FileLock:
        """Held while a file is made. A few locks for all files, so that they need not be cleared away."""
        return FileLock(self.folder / f"{path.name[0]}.lock", timeout=timeout)

    def _path(self, shard: ShardFile, ending: str) -> Path:
        identity = f"{shard.url} {shard.size} {shard.sha256}"
        return self.folder / (hashlib.sha256(identity.encode()).hexdigest()[:32] + ending)


def _check_owned(folder: Path) -> None:
    """Raises RunError for a folder in which others could put their shards in place of those that were checked."""
    state = folder.stat()
    if state.st_uid not in (os.geteuid(), 0) and os.geteuid() != 0:
        raise RunError(f"the cache {folder} is another user's; choose another one with cache=")
    if state.st_mode & stat.S_IWOTH:
        raise RunError(f"anybody may write into the cache {folder}; `chmod o-w` it, or choose another one with cache=")


def retried(attempt: Callable[Arguments, Result], *args: Arguments.args, **named: Arguments.kwargs) -> Result:
    """What `attempt` gives, tried again after growing waits where a network or a server is at fault."""
    for failures in range(ATTEMPTS - 1):
        try:
            return attempt(*args, **named)
        except SddError as error:
            if not _may_pass(error):
                raise
        # The jitter keeps many readers from asking again all at once.
        time.sleep(min(FIRST_WAIT_S * 2**failures, MOST_WAIT_S) + random.uniform(0, FIRST_WAIT_S))
    return attempt(*args, **named)


def is_missing(error: SddError) -> bool:
    """Whether what was asked for is not there, or not for us."""
    cause = error.__cause__
    if not isinstance(cause, FileNotFoundError | PermissionError):
        return False
    # fsspec calls a file on a web server missing for whatever went wrong.
    return not isinstance(cause.__cause__, OSError) and getattr(cause.__cause__, "status", 404) < 500


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, _DamagedError):
        return True
    return isinstance(error, SddError) and error.__cause__ is not None and not is_missing(error)


def _copy(shard: ShardFile, part: Path) -> None:
    fs, inner = file_system(shard.url, ShardError)
    with named_errors(shard.url, ShardError):
        fs.get_file(inner, str(part))
    with part.open("rb") as file:
        _check(shard, file.fileno())


def _check(shard: ShardFile, descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    if size != shard.size:
        raise _damaged(shard, f"{size} bytes instead of {shard.size}")
    if shard.sha256 is None:
        return
    digest = hashlib.sha256()
    for offset in range(0, size, CHUNK):
        digest.update(os.pread(descriptor, CHUNK, offset))
    if digest.hexdigest() != shard.sha256:
        raise _damaged(shard, "its SHA-256 is not the manifest's")


def _is_marked(mark: Path, seen: str) -> bool:
    try:
        return mark.read_text() == seen
    except FileNotFoundError:
        return False


def _damaged(shard: ShardFile, what: str) -> ShardError:
    return _DamagedError(f"{shard.url}: {what}; make or fetch this shard again")
