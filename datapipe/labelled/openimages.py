"""Open Images' tables: boxes by class code, the classes' names, and masks as PNG files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import duckdb
import numpy as np
from pycocotools import mask as coco_mask

from datapipe.errors import SourceError
from datapipe.labelled.images import LabelledImage, LabelledObject, path_in
from datapipe.schema import RLE

_BOXES = """
    SELECT b.ImageID AS image, lower(c.name) AS name,
        b.XMin AS x1, b.YMin AS y1, b.XMax AS x2, b.YMax AS y2, {mask} AS mask
    FROM read_csv($boxes, header = true) b
    JOIN read_csv($classes, header = {header}, names = ['code', 'name'], all_varchar = true) c ON c.code = b.LabelName
    {masks}
    WHERE b.IsGroupOf = 0 AND b.IsDepiction = 0
    ORDER BY b.ImageID, b.LabelName, x1, y1, x2, y2
"""
_MASKS = """LEFT JOIN read_csv($masks, header = true) m ON m.ImageID = b.ImageID AND m.LabelName = b.LabelName
    AND abs(m.BoxXMin - b.XMin) + abs(m.BoxYMin - b.YMin) + abs(m.BoxXMax - b.XMax) + abs(m.BoxYMax - b.YMax) < 4e-3"""


def read_openimages(boxes: Path, classes: Path, images: Path, masks: Path | None = None) -> Iterator[LabelledImage]:
    """In the order of image ids. Groups and depictions are left out.

    boxes: `…-annotations-bbox.csv`; classes: `…class-descriptions….csv`; images: folder of `ImageID.jpg`; masks:
    `…-annotations-object-segmentation.csv`, with the PNG files beside it, in any folder. Raises SourceError.
    """
    given: dict[str, Any] = {"boxes": str(boxes), "classes": str(classes)}
    if masks is not None:
        given["masks"] = str(masks)
    files = {path.name: path for path in masks.parent.rglob("*.png")} if masks else {}
    query = _BOXES.format(
        mask="m.MaskPath" if masks else "NULL", masks=_MASKS if masks else "", header=_has_header(classes)
    )
    try:
        rows = duckdb.execute(query, given)
        columns = [c[0] for c in rows.description]
        image, objects = None, list[LabelledObject]()
        while row := rows.fetchone():
            found = dict(zip(columns, row, strict=True))
            if image is not None and found["image"] != image:
                yield LabelledImage(path_in(images, f"{image}.jpg"), tuple(objects))
                objects = []
            image = found["image"]
            box = (float(found["x1"]), float(found["y1"]), float(found["x2"]), float(found["y2"]))
            objects.append(LabelledObject(found["name"], box, _mask(files.get(found["mask"] or ""))))
        if image is not None:
            yield LabelledImage(path_in(images, f"{image}.jpg"), tuple(objects))
    except duckdb.Error as error:
        raise SourceError(f"{boxes}: not Open Images' boxes and classes ({str(error).splitlines()[0]})") from None


def _has_header(classes: Path) -> bool:
    try:
        with classes.open() as file:
            return file.readline().startswith("LabelName")
    except OSError as error:
        raise SourceError(f"{classes}: cannot be read ({error.strerror})") from None


def _mask(path: Path | None) -> RLE | None:
    if path is None:
        return None
    pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if pixels is None:
        raise SourceError(f"{path}: cannot be read as a mask")
    packed = coco_mask.encode(np.asfortranarray((pixels > 0).astype(np.uint8)))
    return RLE((pixels.shape[0], pixels.shape[1]), packed["counts"].decode())
