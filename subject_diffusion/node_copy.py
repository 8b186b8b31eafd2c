"""Models that lie in a bucket or on a network file system, copied once a node."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock
from fsspec.utils import tokenize

from subject_diffusion.errors import SddError
from subject_diffusion.storage import file_system, named_errors, whole_folder

COPIES = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "subject-diffusion/models"
MOUNTS = Path("/proc/self/mounts")
"""Where Linux says which file systems there are. Without it, all folders count as this machine's own."""

_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|afs|ceph|lustre|gpfs|beegfs\w*|wekafs|panfs|glusterfs|9p|virtiofs|"
    r"fuse(\.(?!fuse-overlayfs|portal|squashfuse|mergerfs)\S+)?"
)
"""Types of file systems whose files are on other machines."""

Wanted = Callable[[Sequence[str]], list[str]]
"""Chooses among the names of a folder's files, relative to it."""


@dataclass(frozen=True)
class _File:
    """`place`: where to read it; `version`: changes when the file does; `size`: in bytes."""

    place: str
    version: str
    size: int


def node_copy(url: str, wanted: Wanted, kind: type[SddError], name: str = "") -> Path:
    """A copy on this machine of a folder in an object store: the one that another process fetched, unless the folder
    has changed since. Raises `kind`, which calls the folder by `name`."""
    fs, root = file_system(url.rstrip("/"), kind, name)
    with named_errors(name or url, kind):
        found = fs.find(root, detail=True)
    files = {
        path.removeprefix(root).lstrip("/"): _File(path, tokenize(info), info["size"] or 0)  # a web server may not say
        for path, info in found.items()
    }
    chosen = {file: files[file] for file in wanted(list(files))}
    if not chosen:
        raise kind(f"{name or url}: no folder with a model in hub format; check the URL")
    for file in chosen:
        if ".." in PurePosixPath(file).parts:
            raise kind(
                f"{name or url}: its file {file!r} would lie outside of the copy's folder; do not use this model"
            )
    with named_errors(name or url, kind):
        copy = _copy_of(url, chosen)
        with FileLock(copy.with_suffix(".lock")):
            if not copy.is_dir():
                _fill(copy, url, chosen, fs.get_file, kind, name)
    return copy


def node_local(path: Path, wanted: Wanted, kind: type[SddError], name: str = "") -> Path:
    """A folder on a disk of this machine, or a file: itself. Of a folder on a network file system a copy, like
    `node_copy`'s; unless that would have no room or no place, or lie on such a file system, too."""
    if not path.is_dir() or not _is_on_network(path):
        return path
    with named_errors(name or str(path), kind):
        chosen = {file: _local_file(path / file) for file in wanted(_below(path))}
    try:
        if _is_on_network(COPIES.expanduser()):
            return path
        copy = _copy_of(str(path.resolve()), chosen)
        with FileLock(copy.with_suffix(".lock")):
            if not copy.is_dir():
                if not chosen or shutil.disk_usage(copy.parent).free < sum(file.size for file in chosen.values()):
                    return path
                _fill(copy, str(path), chosen, shutil.copyfile, kind, name)
    except (OSError, RuntimeError):  # nothing can be written where copies would lie, or there is no home
        return path
    return copy


def _below(folder: Path) -> list[str]:
    walk = os.walk(folder, followlinks=True)
    return [Path(place, name).relative_to(folder).as_posix() for place, _, names in walk for name in names]


def _local_file(path: Path) -> _File:
    stat = path.stat()
    return _File(str(path), f"{stat.st_mtime_ns} {stat.st_size}", stat.st_size)


def _copy_of(url: str, files: dict[str, _File]) -> Path:
    """Where the copy of these versions lies, or is to."""
    versions = sorted((name, file.version) for name, file in files.items())
    copy = COPIES.expanduser() / hashlib.sha256(repr([url, versions]).encode()).hexdigest()[:32]
    copy.parent.mkdir(parents=True, exist_ok=True)
    return copy


def _fill(
    copy: Path, url: str, files: dict[str, _File], get: Callable[[str, str], object], kind: type[SddError], name: str
) -> None:
    size = sum(file.size for file in files.values())
    print(f"fetching {url} ({size / 1e9:.1f} GB)", file=sys.stderr, flush=True)
    with whole_folder(copy) as partial, named_errors(name or url, kind):
        for file, source in files.items():
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            get(source.place, str(partial / file))


def _is_on_network(path: Path) -> bool:
    """Whether the file system of a path, which need not be there yet, is one of `_NETWORK`."""
    if not MOUNTS.exists():
        return False
    mounts = [line.split()[1:3] for line in MOUNTS.read_text(errors="surrogateescape").splitlines()]
    kinds = {_unescaped(place): kind for place, kind in mounts}  # of several in one place, the last counts
    resolved = path.resolve()
    found = next((kinds[str(place)] for place in (resolved, *resolved.parents) if str(place) in kinds), "")
    return _NETWORK.fullmatch(found) is not None


def _unescaped(text: str) -> str:
    """Spaces and the like are written as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
