"""Open Images' tables: boxes by class code, the classes' names, and masks as PNG files."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import cv2
import duckdb

from datapipe.formats.labels import Corners, Faults, LabeledImage, LabeledObject, Place, files_below, find_image
from datapipe.image_file import upright_size
from datapipe.schema import RLE
from datapipe.sources.scanning import shown
from datapipe.sources.temporary_database import temporary_database
from subject_diffusion.errors import SourceError

_TABLES = (
    "CREATE TABLE classes (code, name)",
    "CREATE TABLE boxes (image, code, is_group, is_depiction, x1, y1, x2, y2)",
    "CREATE TABLE masks (image, code, file, x1, y1, x2, y2)",
    "CREATE TABLE files (name PRIMARY KEY, path) WITHOUT ROWID",
)
# What is no number costs its own row, and -1 stands for a flag that nobody checked.
_BOXES = """
    SELECT ImageID, LabelName, TRY_CAST(IsGroupOf AS INT) = 1, TRY_CAST(IsDepiction AS INT) = 1,
        TRY_CAST(XMin AS DOUBLE), TRY_CAST(YMin AS DOUBLE), TRY_CAST(XMax AS DOUBLE), TRY_CAST(YMax AS DOUBLE)
    FROM read_csv($file, header = true, all_varchar = true)
"""
_MASKS = """
    SELECT ImageID, LabelName, MaskPath, TRY_CAST(BoxXMin AS DOUBLE), TRY_CAST(BoxYMin AS DOUBLE),
        TRY_CAST(BoxXMax AS DOUBLE), TRY_CAST(BoxYMax AS DOUBLE)
    FROM read_csv($file, header = true, all_varchar = true)
"""
_CLASSES = """
    SELECT code, lower(name)
    FROM read_csv($file, header = {header}, names = ['code', 'name'], all_varchar = true)
"""
_SORTED = """
    SELECT image, boxes.code, name, is_group, is_depiction, x1, y1, x2, y2
    FROM boxes LEFT JOIN classes USING (code)
    ORDER BY image NULLS LAST, boxes.code NULLS LAST, x1 NULLS LAST, y1 NULLS LAST, x2 NULLS LAST, y2 NULLS LAST
"""
ROWS_AT_ONCE = 1000
_READER: dict[str, Any] = {"memory_limit": "128MB", "threads": 1}
"""Else DuckDB holds what it has read for as long as there is memory."""
_SAME_BOX = 4e-3
"""The tables of boxes and masks round otherwise: the same box differs by up to so much in its corners' sum."""


def read_openimages(
    boxes: Path, classes: Path, images: Path, faults: Faults, masks: Path | None = None
) -> Iterator[LabeledImage]:
    """Reads images in the order of their ids. Groups and depictions are left out; a box or mask that is broken costs
    itself.

    boxes: `…-annotations-bbox.csv`; classes: `…class-descriptions….csv`; images: folder of `ImageID.jpg`, in it or in
    folders such as `train_0`; masks: `…-annotations-object-segmentation.csv`, with the PNG files beside it, in any
    folder. Raises SourceError.
    """
    with os.scandir(images) as inside:
        folders = sorted(Path(entry.path) for entry in inside if entry.is_dir())
    with temporary_database() as database, closing(duckdb.connect(config=_READER)) as reader:
        for table in _TABLES:
            database.execute(table)
        try:
            _add(database, "boxes", shown(_table(reader, _BOXES, boxes), "boxes read"))
            _add(database, "classes", _table(reader, _CLASSES.format(header=_has_header(classes)), classes))
            if masks is not None:
                _add(database, "masks", shown(_table(reader, _MASKS, masks), "masks read"))
                files = files_below(masks.parent, ".png")
                _add(database, "files", shown(((p.name, str(p)) for p in files), "files of masks found"))
        except duckdb.Error as error:
            raise SourceError(f"{boxes}: not Open Images' boxes and classes ({str(error).splitlines()[0]})") from None
        database.execute("CREATE INDEX named ON classes (code)")
        database.execute("CREATE INDEX drawn ON masks (image)")
        for image, found in itertools.groupby(database.execute(_SORTED), key=lambda row: row[0]):
            place = _place(images, folders, f"{image}.jpg")
            unused = _masks_of(image, database)
            objects = (
                _object(_Box(row[1], row[2], row[3], row[4], row[5:]), unused, f"a box of {image}", faults)
                for row in found
            )
            yield LabeledImage(
                place.path, f"{image}.jpg", tuple(o for o in objects if o is not None), problem=place.problem
            )


def _table(reader: duckdb.DuckDBPyConnection, query: str, file: Path) -> Iterator[tuple[Any, ...]]:
    rows = reader.execute(query, {"file": str(file)})
    while some := rows.fetchmany(ROWS_AT_ONCE):
        yield from some


def _add(database: Connection, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
    rows = iter(rows)
    if (first := next(rows, None)) is not None:
        query = f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(first))})"
        database.executemany(query, itertools.chain([first], rows))


@dataclass(frozen=True)
class _Box:
    """A row of the tables. `corners`: of the box, each None where it is no number."""

    code: str
    name: str | None
    is_group: bool
    is_depiction: bool
    corners: tuple[float | None, ...]


@dataclass(frozen=True)
class _Mask:
    code: str
    file: str | None
    path: str | None
    corners: Corners


def _masks_of(image: str, database: Connection) -> list[_Mask]:
    query = """
        SELECT code, file, path, x1, y1, x2, y2 FROM masks LEFT JOIN files ON files.name = masks.file
        WHERE image = ? ORDER BY file NULLS LAST
    """
    found = (_Mask(row[0], row[1], row[2], row[3:]) for row in database.execute(query, (image,)))
    return [mask for mask in found if None not in mask.corners]


def _object(found: _Box, unused: list[_Mask], where: str, faults: Faults) -> LabeledObject | None:
    """`unused`: the image's masks, from which the box's own is taken."""
    if found.is_group or found.is_depiction:
        faults.add("group" if found.is_group else "depiction", where)
        return None
    x1, y1, x2, y2 = found.corners
    if x1 is None or y1 is None or x2 is None or y2 is None:
        faults.add("box that is not four numbers", where)
        return None
    if not found.name:
        faults.add("annotation of an unknown or nameless class", f"{where}: {found.code}")
        return None
    box = (x1, y1, x2, y2)
    near = [(_distance(box, m.corners), i) for i, m in enumerate(unused) if m.code == found.code]
    distance, nearest = min(near, default=(math.inf, -1))
    mask = None
    if distance < _SAME_BOX:
        drawn = unused.pop(nearest)
        mask = _mask(drawn.path)
        if mask is None:
            faults.add("mask whose file is not there or cannot be read: the box stays", f"{where}: {drawn.file}")
    return LabeledObject(found.name, box, mask, where=where)


def _distance(one: Corners, other: Corners) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _place(images: Path, folders: list[Path], name: str) -> Place:
    """In the folder itself, or in one of those that the images are handed out in (`train_0` to `train_f`)."""
    place = find_image(images, name)
    if place.problem or place.path.is_file():
        return place
    return next((Place(folder / name) for folder in folders if (folder / name).is_file()), place)


def _has_header(classes: Path) -> bool:
    try:
        with classes.open(encoding="utf-8-sig") as file:
            return file.readline().startswith("LabelName")
    except OSError as error:
        raise SourceError(f"{classes}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise SourceError(f"{classes}: no text in UTF-8; save it as such") from None


def _mask(path: str | None) -> RLE | None:
    # A small file can claim gigapixels.
    fits = path is not None and upright_size(Path(path)) is not None
    pixels = cv2.imread(path, cv2.IMREAD_GRAYSCALE) if path is not None and fits else None
    return None if pixels is None else RLE.of(pixels)
