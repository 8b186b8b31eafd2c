"""Open Images' tables: boxes by class code, the classes' names, and masks as PNG files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import duckdb

from datapipe.formats.labels import Corners, Faults, LabeledImage, LabeledObject, Place, find_image
from datapipe.schema import RLE
from subject_diffusion.errors import SourceError

# What is no number costs its own row, and -1 stands for a flag that nobody checked.
_BOXES = """
    SELECT b.ImageID, list(struct_pack(
        code := b.LabelName, name := lower(c.name), is_group := TRY_CAST(b.IsGroupOf AS INT) = 1,
        is_depiction := TRY_CAST(b.IsDepiction AS INT) = 1,
        box := [TRY_CAST(b.XMin AS DOUBLE), TRY_CAST(b.YMin AS DOUBLE),
                TRY_CAST(b.XMax AS DOUBLE), TRY_CAST(b.YMax AS DOUBLE)]
    ) ORDER BY b.LabelName, TRY_CAST(b.XMin AS DOUBLE), TRY_CAST(b.YMin AS DOUBLE), TRY_CAST(b.XMax AS DOUBLE),
        TRY_CAST(b.YMax AS DOUBLE)) AS boxes
    FROM read_csv($boxes, header = true, all_varchar = true) b
    LEFT JOIN read_csv($classes, header = {header}, names = ['code', 'name'], all_varchar = true) c
        ON c.code = b.LabelName
    GROUP BY b.ImageID
"""
_MASKS = """
    SELECT ImageID, list(struct_pack(
        code := LabelName, file := MaskPath,
        box := [TRY_CAST(BoxXMin AS DOUBLE), TRY_CAST(BoxYMin AS DOUBLE),
                TRY_CAST(BoxXMax AS DOUBLE), TRY_CAST(BoxYMax AS DOUBLE)]
    ) ORDER BY MaskPath) AS masks
    FROM read_csv($masks, header = true, all_varchar = true) GROUP BY ImageID
"""
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
    given: dict[str, Any] = {"boxes": str(boxes), "classes": str(classes)}
    query = f"SELECT *, NULL AS masks FROM ({_BOXES.format(header=_has_header(classes))}) ORDER BY ImageID"
    if masks is not None:
        given["masks"] = str(masks)
        query = query.replace("*, NULL AS masks", "b.*, m.masks").replace(
            " ORDER BY ImageID", f" b LEFT JOIN ({_MASKS}) m USING (ImageID) ORDER BY ImageID"
        )
    files = {path.name: path for path in masks.parent.rglob("*.png")} if masks else {}
    folders = sorted(path for path in images.iterdir() if path.is_dir())
    try:
        rows = duckdb.execute(query, given)
        while row := rows.fetchone():
            image, found, drawn = row
            place = _place(images, folders, f"{image}.jpg")
            unused = [m for m in drawn or () if None not in m["box"]]
            objects = (_object(b, unused, files, f"a box of {image}", faults) for b in found)
            yield LabeledImage(
                place.path, f"{image}.jpg", tuple(o for o in objects if o is not None), problem=place.problem
            )
    except duckdb.Error as error:
        raise SourceError(f"{boxes}: not Open Images' boxes and classes ({str(error).splitlines()[0]})") from None


def _object(
    found: dict[str, Any], unused: list[dict[str, Any]], files: dict[str, Path], where: str, faults: Faults
) -> LabeledObject | None:
    """`unused`: the image's masks, from which the box's own is taken."""
    if found["is_group"] or found["is_depiction"]:
        faults.add("group" if found["is_group"] else "depiction", where)
        return None
    if None in found["box"]:
        faults.add("box that is not four numbers", where)
        return None
    if not found["name"]:
        faults.add("annotation of an unknown or nameless class", f"{where}: {found['code']}")
        return None
    x1, y1, x2, y2 = found["box"]
    box = (x1, y1, x2, y2)
    near = [(_distance(box, m["box"]), i) for i, m in enumerate(unused) if m["code"] == found["code"]]
    distance, nearest = min(near, default=(math.inf, -1))
    mask = None
    if distance < _SAME_BOX:
        file = unused.pop(nearest)["file"]
        mask = _mask(files.get(file or ""))
        if mask is None:
            faults.add("mask whose file is not there or cannot be read: the box stays", f"{where}: {file}")
    return LabeledObject(found["name"], box, mask, where=where)


def _distance(one: Corners, other: list[float]) -> float:
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


def _mask(path: Path | None) -> RLE | None:
    pixels = None if path is None else cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    return None if pixels is None else RLE.of(pixels)
