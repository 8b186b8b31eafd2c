"""Folders of images: every image below the folder is a row."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from datapipe.image_file import IMAGE_SUFFIXES, is_image_start
from datapipe.sources.columns import columns_of_keys, facts_of
from datapipe.sources.input_files import explained, input_file_system, version_of
from datapipe.sources.path_table import path_of, place_of
from datapipe.sources.row_index import ImagePlace, InputRow, RowFacts
from datapipe.sources.scanning import shown
from datapipe.sources.settings import SourceSettings
from datapipe.sources.store_listing import files_below
from datapipe.sources.temporary_database import temporary_database
from subject_diffusion.storage import is_local

TEXT_LIMIT = 1 << 20
"""Bytes of a .txt or .json beside an image that are read; neither is ever this long."""
TEXT_SUFFIXES = (".txt", ".caption", ".json")
"""Endings of the files beside an image that may tell of it, in the order in which they are asked for its caption."""

_NOT_THE_USERS = {"@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "__MACOSX", "lost+found"}
"""Folders in which file servers and systems keep thumbnails, copies and waste. Hidden ones are left out, too."""
_START_BYTES = 32
_PLAIN_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")


@dataclass(frozen=True)
class ImageFile:
    """An image of a folder. `name`: relative to the folder, as the file system spells it; `texts`: the files beside it
    that may tell of it, in the order of TEXT_SUFFIXES; `text_version` changes with any of them."""

    name: bytes
    size: int
    version: str
    texts: tuple[bytes, ...]
    text_version: str


def image_files(root: str) -> Iterator[ImageFile]:
    """Every image under `root`, in the order of its path parts; hidden files and folders are left out. An image is told
    by its ending, or by its first bytes where the name has none. Links to folders or out of `root` are not followed."""
    fs, inner = input_file_system(root)
    if is_local(fs):
        yield from _local_images(os.fsencode(inner), b"", os.path.realpath(os.fsencode(inner)))
        return
    yield from _images_in_bucket(fs, inner.rstrip("/"))


def _images_in_bucket(fs: Any, root: str) -> Iterator[ImageFile]:
    with temporary_database() as names:
        names.execute("CREATE TABLE names (place PRIMARY KEY, size, version, text_in_lower) WITHOUT ROWID")
        found = shown(files_below(fs, root, _is_hidden), "files looked through")
        names.executemany("INSERT INTO names VALUES (?, ?, ?, ?)", (_place_record(info, root) for info in found))
        names.execute("CREATE INDEX texts ON names (text_in_lower, place) WHERE text_in_lower IS NOT NULL")

        def find(text: str) -> str | None:
            query = "SELECT place FROM names WHERE text_in_lower = ?"
            # In the order of the names: that of their parts is another.
            return max((path_of(place) for (place,) in names.execute(query, (text.encode(),))), default=None)

        def version(text: str) -> str:
            (found,) = names.execute("SELECT version FROM names WHERE place = ?", (place_of(text),)).fetchone()
            return str(found)

        for place, size, own_version in names.execute("SELECT place, size, version FROM names ORDER BY place"):
            name = path_of(place)
            if not _may_be_image(name):
                continue
            if not _has_suffix(name) and not is_image_start(fs.cat_file(f"{root}/{name}", start=0, end=_START_BYTES)):
                continue
            texts = _texts_beside(name, find)
            encoded = tuple(text.encode() for text in texts)
            yield ImageFile(name.encode(), size, own_version, encoded, _joined([version(text) for text in texts]))


def _place_record(info: dict[str, Any], root: str) -> tuple[bytes, int, str, bytes | None]:
    """Place, size and version; of a file that may tell of an image, the name in lower case."""
    name = info["name"].removeprefix(f"{root}/")
    lower = name.lower().encode() if name.lower().endswith(TEXT_SUFFIXES) else None
    return place_of(name), int(info["size"]), version_of(info), lower


def rows_of_folder(root: str, settings: SourceSettings) -> Iterator[InputRow]:
    """One row per image. Its url is its path in the folder; its alt text is that of a .txt, .caption or .json of the
    same name. A .json, as img2dataset writes it, may also tell url, license and scores."""
    fs, inner = input_file_system(root)
    for image in image_files(root):
        facts, caption = RowFacts(), ""
        for text in image.texts:
            path = f"{inner.rstrip('/')}/{os.fsdecode(text)}"
            with explained(path), fs.open(path, "rb") as file:
                content = decoded_text(file.read(TEXT_LIMIT))
            if path.lower().endswith(".json"):
                facts = _facts_of_json(content, settings)
            else:
                caption = caption or content.strip()
        name = image.name.decode("utf-8", "replace")
        facts = RowFacts(facts.url or name, caption or facts.alt_text.strip(), facts.licence, facts.scores)
        yield InputRow(facts, ImagePlace(image.name, 0, image.size))


def decoded_text(content: bytes) -> str:
    """What a text file says: UTF-8, or what its byte order mark says, or Latin-1 as Windows has it."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(content) >= TEXT_LIMIT and error.start > len(content) - 4:  # cut within a character
            return content[: error.start].decode("utf-8-sig")
        return content.decode("cp1252", "replace")


def _facts_of_json(content: str, settings: SourceSettings) -> RowFacts:
    try:
        record: Any = json.loads(content)
    except (ValueError, RecursionError):
        return RowFacts()
    return (
        facts_of(record, columns_of_keys(tuple(record), settings), settings) if isinstance(record, dict) else RowFacts()
    )


def _local_images(root: bytes, below: bytes, real_root: bytes) -> Iterator[ImageFile]:
    with temporary_database() as names:
        names.execute("CREATE TABLE names (name, is_folder, text_in_lower)")
        with os.scandir(os.path.join(root, below)) as listing:
            visible = (entry for entry in listing if not _is_hidden(os.fsdecode(entry.name)))
            records = shown(map(_record, visible), "files looked through")
            names.executemany("INSERT INTO names VALUES (?, ?, ?)", records)
        names.execute("CREATE INDEX texts ON names (text_in_lower, name) WHERE text_in_lower IS NOT NULL")

        def find(text: str) -> str | None:
            query = "SELECT max(name) FROM names WHERE text_in_lower = ?"
            (found,) = names.execute(query, (os.fsencode(text),)).fetchone()
            return None if found is None else os.fsdecode(found)

        for encoded, is_folder in names.execute("SELECT name, is_folder FROM names ORDER BY name"):
            name, path = os.fsdecode(encoded), os.path.join(below, encoded)
            if is_folder:
                yield from _local_images(root, path, real_root)
                continue
            if not _may_be_image(name) or (info := _regular_file(os.path.join(root, path), real_root)) is None:
                continue
            if not _has_suffix(name):
                with open(os.path.join(root, path), "rb") as file:
                    if not is_image_start(file.read(_START_BYTES)):
                        continue
            beside = [os.path.join(below, os.fsencode(text)) for text in _texts_beside(name, find)]
            found = ((text, _regular_file(os.path.join(root, text), real_root)) for text in beside)
            texts = {text: info for text, info in found if info is not None}
            version = _joined([str(info.st_mtime_ns) for info in texts.values()])
            yield ImageFile(path, info.st_size, str(info.st_mtime_ns), tuple(texts), version)


def _record(entry: os.DirEntry[bytes]) -> tuple[bytes, bool, bytes | None]:
    """Name; whether it is a folder; of a file that may tell of an image, the name in lower case."""
    lower = os.fsdecode(entry.name).lower()
    return (
        entry.name,
        entry.is_dir(follow_symlinks=False),
        os.fsencode(lower) if lower.endswith(TEXT_SUFFIXES) else None,
    )


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part in _NOT_THE_USERS


def _has_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _may_be_image(name: str) -> bool:
    """By its ending, or because it has none that says otherwise: `IMG_0001`, `photo.jpg?w=200`."""
    return _has_suffix(name) or not _PLAIN_SUFFIX.fullmatch(os.path.splitext(name)[1])


def _texts_beside(image: str, find: Callable[[str], str | None]) -> list[str]:
    """`find`: a text by its name in lower case; of two that differ in nothing else, the last in order."""
    stem = os.path.splitext(image)[0] if _has_suffix(image) else image
    found = (find(f"{stem}{suffix}".lower()) for suffix in TEXT_SUFFIXES)
    return [text for text in found if text is not None]


def _joined(versions: list[str]) -> str:
    return " ".join(versions)


def _regular_file(path: bytes, real_root: bytes) -> os.stat_result | None:
    """None for a pipe, a broken link, or a link that leaves the folder."""
    if os.path.islink(path) and not os.path.realpath(path).startswith(real_root.rstrip(b"/") + b"/"):
        return None
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return None
    return info if stat.S_ISREG(info.st_mode) else None
