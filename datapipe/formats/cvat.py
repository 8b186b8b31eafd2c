"""CVAT's export "CVAT for images 1.1": one XML file of boxes, polygons and masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from datapipe.formats.labels import (
    Corners,
    Faults,
    LabeledImage,
    LabeledObject,
    around,
    check_size,
    find_image,
    fractions,
    polygons_mask,
    spoken,
)
from datapipe.image_file import upright_size
from datapipe.schema import MAX_PIXELS, RLE
from subject_diffusion.errors import SourceError, one_line

_SHAPES = ("box", "polygon", "mask")


def read_cvat(annotations: Path, images: Path, faults: Faults) -> Iterator[LabeledImage]:
    """Reads images in the order of the file, of which it holds one at a time. Points, lines and other shapes have no
    area and are left out; a shape that is broken costs itself. Raises SourceError."""
    found = False
    root: ElementTree.Element | None = None
    try:
        for event, element in ElementTree.iterparse(annotations, ("start", "end")):
            root = element if root is None else root
            if element.tag == "track":
                raise SourceError(
                    f"{annotations}: tracks of a video, which name no images; export it as 'CVAT for images 1.1'"
                )
            if element.tag == "image" and event == "end":
                found = True
                yield _image(element, images, faults)
                root.clear()
    except (ElementTree.ParseError, LookupError) as error:
        raise SourceError(f"{annotations}: not whole XML ({one_line(error)}); export it again") from None
    except OSError as error:
        raise SourceError(f"{annotations}: cannot be read ({error.strerror})") from None
    if not found:
        what = "no image in it" if root is not None and root.tag == "annotations" else "not CVAT's annotations"
        raise SourceError(f"{annotations}: {what}; for Pascal VOC name the folder of the XML files")


def _image(element: ElementTree.Element, images: Path, faults: Faults) -> LabeledImage:
    name = element.get("name", "")
    place = find_image(images, name)
    if place.problem:
        faults.add("image that cannot be looked for", place.problem)
        return LabeledImage(place.path, name, problem=place.problem)
    said = _size(element.attrib)
    size_px = said or upright_size(place.path)
    if size_px is None:  # it is not there, or no image: its own verdict says so
        return LabeledImage(place.path, name)
    objects = []
    for number, shape in enumerate(element, 1):
        where = f"shape {number} of {name}"
        if shape.tag not in _SHAPES:
            if shape.tag != "tag":
                faults.add(f"shape of a kind without area ({shape.tag})", where)
            continue
        try:
            box, mask = _shape(shape, *size_px)
        except (KeyError, ValueError, OverflowError) as error:
            faults.add("shape that cannot be read", f"{where}: {type(error).__name__}: {one_line(error)}")
            continue
        if label := spoken(shape.get("label", "")):
            objects.append(LabeledObject(label, fractions(box, *size_px), mask, where=where))
        else:
            faults.add("shape without a label", where)
    return LabeledImage(place.path, name, tuple(objects), said)


def _shape(shape: ElementTree.Element, width: int, height: int) -> tuple[Corners, RLE | None]:
    """Its box in pixels, and its mask."""
    value = shape.attrib
    if shape.tag == "box":
        x1, y1, x2, y2 = (float(value[side]) for side in ("xtl", "ytl", "xbr", "ybr"))
        return _turned((x1, y1, x2, y2), math.radians(float(value.get("rotation", 0)))), None
    if shape.tag == "polygon":
        points = [float(v) for point in value["points"].split(";") for v in point.split(",")]
        mask = polygons_mask([points], width, height)
        if mask is None:
            raise ValueError("a polygon of fewer than three points")
        return around(points), mask
    left, top, columns, rows = (int(float(value[side])) for side in ("left", "top", "width", "height"))
    return (left, top, left + columns, top + rows), _mask(value["rle"], (left, top, columns, rows), width, height)


def _mask(rle: str, place: tuple[int, int, int, int], width: int, height: int) -> RLE:
    """CVAT's run lengths go along the rows of the mask's own box, and begin with those that are outside."""
    left, top, columns, rows = place
    check_size(width, height)
    runs = [int(v) for v in rle.split(",")]
    if min(runs) < 0 or min(columns, rows) < 1 or sum(runs) != columns * rows or columns * rows > MAX_PIXELS:
        raise ValueError("run lengths that do not fill the mask's box")
    if left < 0 or top < 0 or left + columns > width or top + rows > height:
        raise ValueError("a mask outside of its image")
    mask = np.zeros((height, width), bool)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask[top : top + rows, left : left + columns] = inside.reshape(rows, columns)
    return RLE.of(mask)


def _turned(box: Corners, angle: float) -> Corners:
    """The upright box around one that is turned about its middle by `angle`, in radians."""
    x1, y1, x2, y2 = box
    across, down = abs(math.cos(angle)), abs(math.sin(angle))
    half_width = ((x2 - x1) * across + (y2 - y1) * down) / 2
    half_height = ((x2 - x1) * down + (y2 - y1) * across) / 2
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return x - half_width, y - half_height, x + half_width, y + half_height


def _size(value: Mapping[str, str]) -> tuple[int, int] | None:
    try:
        width, height = int(value["width"]), int(value["height"])
    except (KeyError, ValueError):
        return None
    return (width, height) if min(width, height) > 0 else None
