"""Files of the input, local or in a bucket, and what to say when they cannot be used."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import lzma
import os
import posixpath
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from fsspec.core import has_magic

from datapipe.sources.compression import COMPRESSED_SUFFIXES, decompressed
from datapipe.sources.row_index import DamagedError
from datapipe.sources.scanning import shown
from datapipe.sources.tar_keys import IMAGE_ENDINGS
from datapipe.sources.temporary_database import temporary_database
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
        """In lower case, and without that of a compression: `.tsv` of `a.TSV.gz`."""
        return _suffix(self.name)

    @property
    def folder(self) -> str:
        """Relative to the input's root."""
        return posixpath.dirname(self.name)


@dataclass(frozen=True)
class Listing:
    """What an input path stands for. `root`: the folder that names are relative to; `files`: tables, tars and lists of
    URLs, sorted by name; `images`: how many images lie beside them."""

    path: str
    root: str
    is_folder: bool
    files: tuple[InputFile, ...]
    images: int = 0


def list_files(path: str) -> Listing:
    """The file itself, the files in a folder and below it (but hidden and `_` ones), or those that match a glob."""
    fs, inner = input_file_system(path)
    if fs.isdir(inner):
        return _listing(path, fs, inner, shown(_below(fs, inner), "files looked through"))
    if fs.exists(inner):
        return _listing(path, fs, fs._parent(inner), [fs.info(inner)], is_folder=False)
    if has_magic(inner):
        infos = list(fs.glob(inner, detail=True).values())
        if not infos:
            raise SourceError(
                f"input {path}: no file matches; check the pattern (quote it, so that the shell leaves it alone)"
            )
        return _listing(path, fs, _fixed_part(inner), infos, is_folder=False)
    raise SourceError(f"input {path}: no such file or folder{_neighbor(fs, inner)}; check the path")


def _listing(path: str, fs: Any, root: str, infos: Iterable[dict[str, Any]], is_folder: bool = True) -> Listing:
    with temporary_database() as names:
        names.execute("CREATE TABLE pictures (stem)")
        names.execute("CREATE TABLE files (stem, url, name, size, version)")
        for info in infos:
            suffix = _suffix(info["name"])
            is_picture = suffix[1:] in IMAGE_ENDINGS
            is_list = suffix == LIST_SUFFIX and not is_folder
            if not (is_picture or is_list or suffix in (*TABLE_SUFFIXES, TAR_SUFFIX)):
                continue
            file = _input_file(fs, root, info)
            if file is None:
                continue
            stem = os.fsencode(os.path.splitext(file.name)[0])
            if is_picture:
                names.execute("INSERT INTO pictures VALUES (?)", (stem,))
            else:
                row = (stem, os.fsencode(file.url), os.fsencode(file.name), file.size, file.version)
                names.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?)", row)
        (images,) = names.execute("SELECT count(*) FROM pictures").fetchone()
        # A text or a json of an image's own name says something of that image, and is no table.
        beside = "WHERE stem NOT IN (SELECT stem FROM pictures)" if is_folder else ""
        rows = names.execute(f"SELECT url, name, size, version FROM files {beside} ORDER BY name")
        files = tuple(InputFile(os.fsdecode(url), os.fsdecode(name), *rest) for url, name, *rest in rows)
    return Listing(path, _url(fs, root), is_folder, files, images)


def files_beside(listing: Listing, files: Sequence[InputFile], suffix: str) -> dict[str, InputFile]:
    """Files named like these but for their suffix, such as 0.parquet for 0.tar.gz, by the names of these. Hidden ones,
    and those of a web server, which lists nothing, are left out."""
    around = {file.name: file for file in listing.files}
    if not listing.is_folder:
        for folder in sorted({posixpath.dirname(f.url) for f in files if not f.url.startswith("http")}):
            fs, inner = input_file_system(folder)
            _, root = input_file_system(listing.root)
            found = (_input_file(fs, root, info) for info in fs.ls(inner, detail=True))
            around |= {file.name: file for file in found if file}
    names = {file.name: file.name.removesuffix(_packed_suffix(file)) for file in files}
    beside = {name: around.get(os.path.splitext(plain)[0] + suffix) for name, plain in names.items()}
    return {name: file for name, file in beside.items() if file is not None}


def _packed_suffix(file: InputFile) -> str:
    suffix = os.path.splitext(file.name)[1]
    return suffix if suffix.lower() in COMPRESSED_SUFFIXES else ""


def _below(fs: Any, root: str) -> Iterator[dict[str, Any]]:
    """What lies in each folder, the root first. Hidden folders and links to folders are not entered."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        below: list[str] = []
        for info in _inside(folder) if is_local(fs) else fs.ls(folder, detail=True, refresh=True):
            # A bucket may list the folder itself among what is in it.
            if is_hidden(os.path.basename(info["name"].rstrip("/"))) or info["name"].rstrip("/") == root.rstrip("/"):
                continue
            if info["type"] != "directory":
                yield info
            elif not info.get("islink"):
                below.append(info["name"])
        waiting.extend(sorted(below, reverse=True))


def _inside(folder: str) -> Iterator[dict[str, Any]]:
    """As `fs.ls` of a folder on this machine, without holding it; of a file, no more than its name and type."""
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = "directory" if entry.is_dir() else "file" if entry.is_file() else "other"
            yield {"name": entry.path, "type": kind, "islink": entry.is_symlink()}


def is_hidden(name: str) -> bool:
    """Hidden files, marks such as `_SUCCESS`, and what file managers leave."""
    return name.startswith((".", "_")) or name == "@eaDir"


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


def _suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSED_SUFFIXES:
        suffix = os.path.splitext(stem)[1]
    return _SHORT_SUFFIXES.get(suffix, suffix)


def _input_file(fs: Any, root: str, info: dict[str, Any]) -> InputFile | None:
    path = info["name"]
    if info.get("islink") or "size" not in info:
        try:
            info = fs.info(path)
        except FileNotFoundError:  # it points nowhere
            return None
    if info["type"] != "file":
        return None
    name = path.removeprefix(root.rstrip("/")).lstrip("/")
    return InputFile(_url(fs, path), name, int(info["size"] or 0), version_of(info))


def _url(fs: Any, inner: str) -> str:
    """Absolute, because workers have another working directory."""
    return inner if is_local(fs) else str(fs.unstrip_protocol(inner))


def _fixed_part(pattern: str) -> str:
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if has_magic(part))
    return "/".join(parts[:fixed]) or "/"


def _neighbor(fs: Any, inner: str) -> str:
    """The most similar name in the same folder, when there is one."""
    try:
        names = [os.path.basename(n) for n in fs.ls(fs._parent(inner), detail=False)]
    except OSError:
        return ""
    near = difflib.get_close_matches(os.path.basename(inner), names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
