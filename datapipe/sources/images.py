"""Inputs that bring their images along: img2dataset's WebDataset tars and folders of images."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import fsspec

from datapipe.errors import SourceError
from datapipe.sources.columns import RowFacts, recognise
from datapipe.sources.index import ImagePlace, IndexRow
from datapipe.sources.settings import SourceSettings
from datapipe.sources.storage import InputFile, explained, one_line, version_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

TEXT_LIMIT = 1 << 20
"""Bytes of a .txt or .json beside an image that are read; neither is ever this long."""


def rows_of_tars(files: Sequence[InputFile], settings: SourceSettings) -> Iterator[IndexRow]:
    """Every sample of img2dataset's tars, in order: what its json (or txt) says, and where its image lies."""
    # In a bucket, most of the time is waiting.
    with ThreadPoolExecutor(8) as pool:
        window = 16
        for start in range(0, len(files), window):
            for rows in pool.map(lambda file: _rows_of_tar(file, settings), files[start : start + window]):
                yield from rows


def _rows_of_tar(file: InputFile, settings: SourceSettings) -> list[IndexRow]:
    rows: list[IndexRow] = []
    key, parts, image = "", dict[str, bytes](), None
    with explained(file.url), fsspec.open(file.url, "rb") as opened:
        try:
            for member in _members(opened):
                folder, base = os.path.split(member.name)
                stem, _, suffix = base.partition(".")
                if (member_key := os.path.join(folder, stem)) != key:
                    if parts or image:
                        rows.append(_sample(parts, image, settings))
                    key, parts, image = member_key, {}, None
                suffix = suffix.lower()
                if f".{suffix}" in IMAGE_SUFFIXES:
                    image = image or ImagePlace(os.fsencode(file.name), member.offset_data, member.size)
                elif suffix in ("json", "txt"):
                    opened.seek(member.offset_data)
                    parts[suffix] = opened.read(min(member.size, TEXT_LIMIT))
        except tarfile.TarError as error:
            raise SourceError(
                f"input {file.url}: not a whole tar ({one_line(error)}, after {len(rows)} samples); download it again "
                "or take it away"
            ) from None
        if parts or image:
            rows.append(_sample(parts, image, settings))
    return rows


def _members(opened: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    if not opened.read(1):
        raise tarfile.ReadError("empty file")
    opened.seek(0)
    with tarfile.open(fileobj=opened, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every one of them
            if member.isreg():
                yield member


def _sample(parts: Mapping[str, bytes], image: ImagePlace | None, settings: SourceSettings) -> IndexRow:
    try:
        record: Any = json.loads(parts.get("json", b"{}"))
    except (ValueError, RecursionError):
        record = {}
    if not isinstance(record, dict):
        record = {}
    try:
        facts = RowFacts.of(record, recognise(list(record), settings))
    except KeyError:
        # A json without the key that the recipe names: what is recognised by itself will do.
        facts = RowFacts.of(record, recognise(list(record), SourceSettings()))
    if not facts.alt_text:
        facts = RowFacts(facts.url, parts.get("txt", b"").decode("utf-8", "replace"), facts.licence, facts.scores)
    return IndexRow(facts, image)


@dataclass(frozen=True)
class ImageFile:
    """An image of a folder. `name`: relative to the folder, as the file system spells it; `text`: its .txt."""

    name: bytes
    size: int
    version: str
    text: bytes | None
    text_version: str


def image_files(root: str) -> Iterator[ImageFile]:
    """Every image under `root`, in the order of its path parts. Links to folders or out of `root` are not followed."""
    fs, inner = fsspec.url_to_fs(root)
    if "file" in fs.protocol:
        yield from _local_images(os.fsencode(inner), b"", os.path.realpath(os.fsencode(inner)))
        return
    found = fs.find(inner, detail=True)
    names = {path.removeprefix(inner.rstrip("/") + "/"): info for path, info in found.items()}
    for name in sorted(names, key=lambda n: n.split("/")):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            info, text = names[name], names.get(f"{stem}.txt")
            text_name = f"{stem}.txt".encode() if text else None
            yield ImageFile(name.encode(), int(info["size"]), version_of(info), text_name, version_of(text or {}))


def rows_of_folder(root: str) -> Iterator[IndexRow]:
    """One row an image. Its url is its path in the folder; its alt text that of a .txt of the same name."""
    fs, inner = fsspec.url_to_fs(root)
    for image in image_files(root):
        alt_text = ""
        if image.text is not None:
            path = f"{inner.rstrip('/')}/{os.fsdecode(image.text)}"
            with explained(path), fs.open(path, "rb") as opened:
                alt_text = opened.read(TEXT_LIMIT).decode("utf-8", "replace").strip()
        facts = RowFacts(url=image.name.decode("utf-8", "replace"), alt_text=alt_text)
        yield IndexRow(facts, ImagePlace(image.name, 0, image.size))


def _local_images(root: bytes, below: bytes, real_root: bytes) -> Iterator[ImageFile]:
    with os.scandir(os.path.join(root, below)) as listing:
        entries = {entry.name: entry for entry in listing}
    for name in sorted(entries):
        path = os.path.join(below, name)
        if entries[name].is_dir(follow_symlinks=False):
            yield from _local_images(root, path, real_root)
            continue
        stem, suffix = os.path.splitext(path)
        if suffix.lower().decode("utf-8", "replace") not in IMAGE_SUFFIXES:
            continue
        if (info := _regular_file(entries[name], real_root)) is None:
            continue
        beside = entries.get(os.path.basename(stem) + b".txt")
        text = _regular_file(beside, real_root) if beside else None
        yield ImageFile(
            path,
            info.st_size,
            str(info.st_mtime_ns),
            stem + b".txt" if text else None,
            str(text.st_mtime_ns if text else ""),
        )


def _regular_file(entry: os.DirEntry[bytes], real_root: bytes) -> os.stat_result | None:
    """None for a pipe, a broken link, or a link that leaves the folder."""
    if entry.is_symlink() and not os.path.realpath(entry.path).startswith(real_root.rstrip(b"/") + b"/"):
        return None
    try:
        info = entry.stat()
    except FileNotFoundError:
        return None
    return info if stat.S_ISREG(info.st_mode) else None
