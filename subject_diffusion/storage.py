"""Files and folders, local or in an object store: opened, written whole or not at all, their errors in one line."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec

from subject_diffusion._extras import help_for
from subject_diffusion.errors import RunError, SddError, one_line

STALL_S = 30
"""A server that sends nothing for this long has failed."""
PARTIAL = ".partial-"
"""First part of the name of a folder that is not whole yet."""

_TEMPORARY = re.compile(r"\.[^/]+\.tmp-\d+-[0-9a-f]{8}$")
_STORE_CLIENTS = {"botocore", "aiobotocore", "s3fs", "gcsfs", "google", "aiohttp", "httpx", "httpx2", "huggingface_hub"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}


def file_system(url: str, kind: type[SddError], name: str = "") -> tuple[Any, str]:
    """fsspec's file system for a path or URL, and the path within it. A server that stalls is an error there, not a
    wait. Raises `kind`, which calls the URL by `name`."""
    options: dict[str, dict[str, Any]] = {
        "s3": {"config_kwargs": {"read_timeout": STALL_S, "connect_timeout": STALL_S}},
        "gs": {"timeout": STALL_S},
    }
    protocol = fsspec.utils.get_protocol(url).replace("https", "http").replace("gcs", "gs")
    if protocol == "http":
        options["http"] = {"client_kwargs": {"timeout": _http_timeout()}}
    with named_errors(name or url, kind):
        try:
            found: tuple[Any, str] = fsspec.url_to_fs(url, **options.get(protocol, {}))
            return found
        except ValueError as error:  # a protocol that fsspec does not know
            raise kind(f"{name or url}: {one_line(error)}; use a path, s3://, gs:// or http(s)://") from None


def is_local(fs: Any) -> bool:
    """Whether it is this machine's file system."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


@contextlib.contextmanager
def named_errors(path: str, kind: type[SddError]) -> Iterator[None]:
    """Errors of a file system, local or remote, become `kind`: one line that names the path and says what to do. Its
    `__cause__` is the error itself."""
    try:
        yield
    except Exception as error:
        # Object stores raise their client's own classes for missing credentials and the like.
        if not isinstance(error, OSError | ImportError) and type(error).__module__.split(".")[0] not in _STORE_CLIENTS:
            raise
        raise kind(f"{path}: {_explained(error)}") from error


def temporary_file() -> IO[bytes]:
    """A file without a name, gone with the process, for what is too much to hold: in TMPDIR, by default /var/tmp, since
    /tmp is in memory on many systems. Raises RunError where there is no room."""
    try:
        return tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp"))
    except OSError as error:
        raise no_room(error) from None


def no_room(error: Exception) -> RunError:
    return RunError(f"no room for temporary files ({one_line(error)}); set TMPDIR to a folder that has some")


@contextlib.contextmanager
def whole_file(path: str | Path, fs: Any = None) -> Iterator[IO[bytes]]:
    """A file to write to, which appears at `path` when the block ends well, and else leaves nothing behind.

    fs: the fsspec file system that the path is of; default: this machine's.
    """
    path = str(path)
    local = fs is None or is_local(fs)
    folder, _, name = path.rpartition("/")
    folder = folder or ("/" if path.startswith("/") else ".")
    draft = Path(folder if local else tempfile.gettempdir()) / f".{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if local:
            os.replace(draft, path)
            _sync(Path(folder))
        else:
            fs.put_file(str(draft), path)
    finally:
        draft.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether `whole_file` gave a file this name, of a writer that is at work or was killed."""
    return _TEMPORARY.search(name) is not None


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends well."""
    partial = folder.with_name(PARTIAL + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _http_timeout() -> Any:
    from aiohttp import ClientTimeout

    return ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)


def _explained(error: Exception) -> str:
    """What is wrong, and what to do."""
    if type(error).__name__ in _NO_CREDENTIALS:
        return (
            f"no credentials for this bucket ({one_line(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or "
            "AWS_PROFILE), or for gs:// GOOGLE_APPLICATION_CREDENTIALS"
        )
    if isinstance(error, FileNotFoundError):
        return "no such file or folder; check the path"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return "there is a file where a folder is wanted; name another folder"
    if isinstance(error, PermissionError):
        return "permission denied; let this user read and write there, or check the bucket's credentials"
    if isinstance(error, ImportError):  # the file systems of buckets are extras
        missing = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        return help_for(missing) or one_line(error)
    what = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return f"{what}; check the path and the storage"
