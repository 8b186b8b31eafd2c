"""Files of the input, local or in a bucket, and what to say when they cannot be used."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import posixpath
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from datapipe.sources.compression import COMPRESSED_SUFFIXES, decompressed
from datapipe.sources.row_index import DamagedError
from subject_diffusion.errors import SourceError, one_line
from subject_diffusion.storage import file_system, is_local, named_errors

CONTENT_LIMIT = 64 << 20
"""Local tables of up to this many bytes together are told apart by content: a copy or a `touch` changes nothing."""


TABLE_SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".tfrecord")
LIST_SUFFIX = ".txt"
"""A list of URLs if it is named itself; in a folder of images, a caption."""
TAR_SUFFIX = ".tar"

_SHORT_SUFFIXES = {".tgz": TAR_SUFFIX, ".feather": ".arrow", ".pq": ".parquet", ".parq": ".parquet"}


@dataclass(frozen=True)
class InputFile:
    """One file of the input. `name`: relative to the input's root; `version`: changes when the file does."""

    url: str
    name: str
    size: int
    version: str

    @property
    def suffix(self) -> str:
        """As `suffix_of`."""
        return suffix_of(self.name)

    @property
    def folder(self) -> str:
        """Relative to the input's root."""
        return posixpath.dirname(self.name)


def with_content_versions(files: Callable[[], Iterable[InputFile]]) -> Iterator[InputFile]:
    """The same files; small local ones with the hash of their content as version, not the time of their change.
    `files` gives them as often as it is called."""
    local = all("://" not in f.url for f in files())
    if not local or sum(f.size for f in files()) > CONTENT_LIMIT:
        yield from files()
        return
    for file in files():
        yield replace(file, version=hashlib.sha256(Path(file.url).read_bytes()).hexdigest())


def version_of(info: dict[str, Any]) -> str:
    """The ETag where the storage has one, else the time of the last change."""
    for key in ("ETag", "etag", "mtime", "LastModified", "updated"):
        if info.get(key):
            return str(info[key])
    return ""


@contextmanager
def explained(path: str) -> Iterator[None]:
    """What the storage, a parquet reader or a decompressor raises about an input becomes a SourceError of one line; a
    DamagedError, where it is the content that is wrong."""
    with named_errors(f"input {path}", SourceError):
        try:
            yield
        except (pa.ArrowException, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DamagedError(
                f"input {path}: damaged ({one_line(error)}); download it again or take it away"
            ) from None
        except OSError as error:
            # Decompressors' errors have no number, the operating system's have.
            if error.errno is not None or type(error) is not OSError:
                raise
            raise DamagedError(
                f"input {path}: damaged ({one_line(error)}); download it again or take it away"
            ) from None


def input_file_system(path: str) -> tuple[Any, str]:
    """fsspec's file system of the input, and the path within it. Raises SourceError."""
    return file_system(path, SourceError, f"input {path}")


@contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """A file of the input, for reading, decompressed if need be; an error at reading it is explained."""
    with opened_as_it_is(url) as file:
        yield decompressed(file)


@contextmanager
def opened_as_it_is(url: str) -> Iterator[IO[bytes]]:
    """As `opened`, still compressed."""
    fs, inner = input_file_system(url)
    with explained(url), fs.open(inner, "rb") as file:
        yield file


def suffix_of(name: str) -> str:
    """In lower case, and without that of a compression: `.tsv` of `a.TSV.gz`."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSED_SUFFIXES:
        suffix = os.path.splitext(stem)[1]
    return _SHORT_SUFFIXES.get(suffix, suffix)


def input_file_of(fs: Any, root: str, info: dict[str, Any]) -> InputFile | None:
    """The file of which a listing says this; None if it is none. `root`: what its name is to be relative to."""
    path = info["name"]
    if info.get("islink") or "size" not in info:
        try:
            info = fs.info(path)
        except FileNotFoundError:  # it points nowhere
            return None
    if info["type"] != "file":
        return None
    name = path.removeprefix(root.rstrip("/")).lstrip("/")
    return InputFile(url_of(fs, path), name, int(info["size"] or 0), version_of(info))


def url_of(fs: Any, inner: str) -> str:
    """Absolute, because workers have another working directory."""
    return inner if is_local(fs) else str(fs.unstrip_protocol(inner))
