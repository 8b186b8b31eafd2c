"""Models that lie in a bucket, fetched once a node."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from filelock import FileLock
from fsspec.utils import tokenize

from subject_diffusion.errors import SddError
from subject_diffusion.storage import file_system, named_errors, whole_folder

COPIES = Path("~/.cache/subject-diffusion/models")


def node_copy(url: str, wanted: Callable[[Sequence[str]], list[str]], kind: type[SddError], name: str = "") -> Path:
    """A copy on this machine of a folder in an object store: the one that another process fetched, unless the folder
    has changed since. wanted: chooses among the names of its files, relative to it. Raises `kind`, which calls the
    folder by `name`."""
    fs, root = file_system(url.rstrip("/"), kind, name)
    with named_errors(name or url, kind):
        found = fs.find(root, detail=True)
    listed = {path.removeprefix(root).lstrip("/"): info for path, info in found.items()}
    versions = {file: tokenize(listed[file]) for file in wanted(list(listed))}
    if not versions:
        raise kind(f"{name or url}: no folder with a model in hub format; check the URL")
    for file in versions:
        if ".." in PurePosixPath(file).parts:
            raise kind(
                f"{name or url}: its file {file!r} would lie outside of the copy's folder; do not use this model"
            )
    copy = COPIES.expanduser() / hashlib.sha256(repr([url, sorted(versions.items())]).encode()).hexdigest()[:32]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_suffix(".lock")):
        if not copy.is_dir():
            size = sum(listed[file]["size"] or 0 for file in versions)  # a web server may not say
            print(f"fetching {url} ({size / 1e9:.1f} GB)", file=sys.stderr, flush=True)
            with whole_folder(copy) as partial, named_errors(name or url, kind):
                for file in versions:
                    (partial / file).parent.mkdir(parents=True, exist_ok=True)
                    fs.get_file(f"{root}/{file}", str(partial / file))
    return copy
