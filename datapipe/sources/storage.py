"""Files of the input, local or in a bucket, and what to say when they cannot be used."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.core import has_magic

from datapipe.errors import SourceError

CONTENT_LIMIT = 64 << 20
"""Local tables of up to this many bytes together are told apart by content: a copy or a `touch` changes nothing."""


@dataclass(frozen=True)
class InputFile:
    """One file of the input. `name`: relative to the input's root; `version`: changes when the file does."""

    url: str
    name: str
    size: int
    version: str

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1].lower()


@dataclass(frozen=True)
class Listing:
    """What an input path stands for. `root`: the folder that names are relative to; files sorted by name."""

    path: str
    root: str
    is_folder: bool
    files: tuple[InputFile, ...]


def list_files(path: str) -> Listing:
    """The file itself, the files directly in a folder (but hidden and `_` ones), or those that match a glob."""
    try:
        fs, inner = fsspec.url_to_fs(os.path.expanduser(path))
    except (ValueError, ImportError) as error:  # a protocol that fsspec does not know, or has no package for
        raise SourceError(
            f"input {path}: cannot be opened ({one_line(error)}); use a local path, s3:// or gs://"
        ) from None
    if fs.isdir(inner):
        root, infos, is_folder = inner, fs.ls(inner, detail=True, refresh=True), True
    elif fs.exists(inner):
        root, infos, is_folder = fs._parent(inner), [fs.info(inner)], False
    elif has_magic(inner):
        root, infos, is_folder = _fixed_part(inner), list(fs.glob(inner, detail=True).values()), False
    else:
        raise SourceError(f"input {path}: no such file or folder{_neighbour(fs, inner)}; check the path")
    files = sorted((f for f in (_input_file(fs, root, i, is_folder) for i in infos) if f), key=lambda f: f.name)
    if has_magic(inner) and not files and not is_folder:
        raise SourceError(
            f"input {path}: no file matches; check the pattern (quote it, so that the shell leaves it alone)"
        )
    return Listing(path, _url(fs, root), is_folder, tuple(files))


def with_content_versions(files: tuple[InputFile, ...]) -> tuple[InputFile, ...]:
    """The same files; small local ones with the hash of their content as version, not the time of their change."""
    local = all("://" not in f.url for f in files)
    if not local or sum(f.size for f in files) > CONTENT_LIMIT:
        return files
    return tuple(InputFile(f.url, f.name, f.size, hashlib.sha256(Path(f.url).read_bytes()).hexdigest()) for f in files)


def version_of(info: dict[str, Any]) -> str:
    """The ETag where the storage has one, else the time of the last change."""
    for key in ("ETag", "etag", "mtime", "LastModified", "updated"):
        if info.get(key):
            return str(info[key])
    return ""


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns what the storage raises about `path` into a SourceError of one line."""
    from botocore.exceptions import (  # type: ignore[import-untyped]  # it has no stubs
        BotoCoreError,
        NoCredentialsError,
        PartialCredentialsError,
    )
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError, GoogleAuthError) as error:
        raise SourceError(
            f"input {path}: no credentials for this bucket ({one_line(error)}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), or for gs:// GOOGLE_APPLICATION_CREDENTIALS"
        ) from None
    except pa.ArrowException as error:
        raise SourceError(f"input {path}: damaged ({one_line(error)}); download it again or take it away") from None
    except PermissionError as error:
        raise SourceError(
            f"input {path}: permission denied ({one_line(error)}); make it readable for this user, or check the "
            "bucket's credentials"
        ) from None
    except FileNotFoundError as error:
        raise SourceError(f"input {path}: no such file or folder ({one_line(error)}); check the path") from None
    except (OSError, BotoCoreError) as error:
        raise SourceError(f"input {path}: cannot be read ({one_line(error)}); check the path and the storage") from None


def one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _input_file(fs: Any, root: str, info: dict[str, Any], is_folder: bool) -> InputFile | None:
    path = info["name"]
    if is_folder and os.path.basename(path).startswith((".", "_")):
        return None
    if info.get("islink"):
        try:
            info = fs.info(path)
        except FileNotFoundError:  # it points nowhere
            return None
    if info["type"] != "file":
        return None
    name = path.removeprefix(root.rstrip("/")).lstrip("/")
    return InputFile(_url(fs, path), name, int(info["size"] or 0), version_of(info))


def _url(fs: Any, inner: str) -> str:
    """Absolute, for workers have another working directory."""
    return (
        inner
        if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
        else fs.unstrip_protocol(inner)
    )


def _fixed_part(pattern: str) -> str:
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if has_magic(part))
    return "/".join(parts[:fixed]) or "/"


def _neighbour(fs: Any, inner: str) -> str:
    """The most similar name in the same folder, when there is one."""
    try:
        names = [os.path.basename(n) for n in fs.ls(fs._parent(inner), detail=False)]
    except OSError:
        return ""
    near = difflib.get_close_matches(os.path.basename(inner), names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
