"""Label Studio's exports JSON and JSON-MIN: rectangles, polygons and brush strokes, in percent of the image."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from datapipe.formats.labels import (
    Corners,
    Faults,
    LabeledImage,
    LabeledObject,
    Place,
    around,
    check_size,
    find_image,
    json_elements,
    polygons_mask,
    spoken,
)
from datapipe.image_file import IMAGE_SUFFIXES
from datapipe.schema import RLE
from subject_diffusion.errors import SourceError, one_line

_LABELS = ("rectanglelabels", "polygonlabels", "brushlabels")
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
"""Label Studio puts it before the names of files that were uploaded."""


def read_label_studio(tasks: Path, images: Path, faults: Faults) -> Iterator[LabeledImage]:
    """Reads images in the order of their tasks, each with its last annotation that was not cancelled. A region that is
    broken costs itself. Raises SourceError."""
    started = False
    for _, same in itertools.groupby(_tasks(tasks), key=lambda numbered: numbered[0]):
        ((_, task),) = collections.deque(same, maxlen=1)
        started = True
        yield _image(task, images, faults)
    if not started:
        raise SourceError(f"{tasks}: no task in it; export it again")


def _tasks(path: Path) -> Iterator[tuple[int | str, Mapping[str, Any]]]:
    """Every task of a file, as JSON has it, and what is the same for neighbors that are one task: JSON-MIN repeats it
    for each of its annotations."""
    for number, (_, task) in enumerate(json_elements(path), 1):
        if not isinstance(task, dict) or not ("data" in task or "annotation_id" in task):
            raise SourceError(
                f"{path}: not Label Studio's list of tasks (record {number}); export it as JSON, JSON-MIN or COCO"
            )
        yield (number, task) if "data" in task else (str(task.get("id")), _of_json_min(task))


def _of_json_min(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record of JSON-MIN as a task of JSON. It has the task's data and, in lists beside them, the regions of one
    annotation, the key of whose labels tells what they are."""
    found = (region for value in record.values() if isinstance(value, list) for region in value)
    regions = [
        {
            "id": number,
            "type": next((kind for kind in _LABELS if kind in region), None),
            "value": region,
            "original_width": region.get("original_width"),
            "original_height": region.get("original_height"),
        }
        for number, region in enumerate((region for region in found if isinstance(region, dict)), 1)
    ]
    return {"id": record.get("id"), "data": record, "annotations": [{"result": regions}]}


def _image(task: Mapping[str, Any], images: Path, faults: Faults) -> LabeledImage:
    number = f"task {task.get('id', '(without an id)')}"
    url = _image_of(task["data"])
    if not url:
        faults.add("task without an image", number)
        return LabeledImage(images, number, problem="it has no image")
    place = _place(images, url)
    if place.problem:
        faults.add("image that cannot be looked for", f"{number}: {place.problem}")
        return LabeledImage(place.path, url, problem=place.problem)
    done = [a for a in task.get("annotations") or () if isinstance(a, dict) and not a.get("was_cancelled")]
    regions = [r for r in (done[-1].get("result") or () if done else ()) if isinstance(r, dict)]
    objects = []
    for region in regions:
        where = f"region {region.get('id', '(without an id)')} of {number}"
        kind = region.get("type")
        if kind not in _LABELS:
            faults.add(f"region of a kind without area or name ({kind})", where)
            continue
        try:
            names, box, mask = _region(region, kind)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            faults.add("region that cannot be read", f"{where}: {type(error).__name__}: {one_line(error)}")
            continue
        objects += [LabeledObject(name, box, mask, where=where) for name in map(spoken, names) if name]
    return LabeledImage(place.path, place.path.name, tuple(objects), _size(regions))


def _size(regions: list[dict[str, Any]]) -> tuple[int, int] | None:
    """Width and height that the regions are of, where they agree."""
    sizes = {(r.get("original_width"), r.get("original_height")) for r in regions}
    width, height = sizes.pop() if len(sizes) == 1 else (None, None)
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def _region(region: Mapping[str, Any], kind: str) -> tuple[list[str], Corners, RLE | None]:
    """Its labels, its box as fractions, and its mask."""
    value = region["value"]
    names = [str(name) for name in value[kind]]
    width, height = int(region["original_width"]), int(region["original_height"])
    check_size(width, height)
    if kind == "rectanglelabels":
        corner = (float(value["x"]) * width / 100, float(value["y"]) * height / 100)
        sides = (float(value["width"]) * width / 100, float(value["height"]) * height / 100)
        points = _rectangle(corner, sides, math.radians(float(value.get("rotation") or 0)))
        return names, _share(around(points), width, height), None
    if kind == "polygonlabels":
        points = [float(v) * side / 100 for p in value["points"] for v, side in zip(p, (width, height), strict=True)]
        mask = polygons_mask([points], width, height)
        if mask is None:
            raise ValueError("a polygon of fewer than three points")
        return names, _share(around(points), width, height), mask
    pixels = _brush(value["rle"], width * height * 4).reshape(height, width, 4)[..., 3] > 0
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        raise ValueError("an empty mask")
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return names, _share(box, width, height), RLE.of(pixels)


def _rectangle(corner: tuple[float, float], sides: tuple[float, float], angle: float) -> list[float]:
    """x and y of the four corners of a rectangle that is turned about its first one, clockwise."""
    cos, sin = math.cos(angle), math.sin(angle)
    steps = [(0.0, 0.0), (sides[0], 0.0), sides, (0.0, sides[1])]
    return [v for x, y in steps for v in (corner[0] + x * cos - y * sin, corner[1] + x * sin + y * cos)]


def _share(box: Corners, width: int, height: int) -> Corners:
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _brush(rle: list[int], size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Label Studio's packing of RGBA bytes (that of the library thi.ng/rle-pack).

    A number of bits at a time, highest first: 32, how many values there are; 5, bits of a value, less one; 4 × 4, bits
    of the four sizes of a length, less one. Then blocks: 1, whether one value is repeated; 2, which size the length
    has; the length, less one; and the value, or as many values.
    """
    bits = np.unpackbits(np.array(rle, np.uint8))
    at = 0

    def number(count: int) -> int:
        nonlocal at
        if at + count > len(bits):
            raise ValueError("brush strokes that end early")
        at += count
        return int(bits[at - count : at] @ (1 << np.arange(count - 1, -1, -1, dtype=np.int64)))

    total, width = number(32), number(5) + 1
    if total != size:
        raise ValueError(f"brush strokes of {total} bytes on an image of {size}")
    sizes = [number(4) + 1 for _ in range(4)]
    values = np.zeros(total, np.uint8)
    done = 0
    while done < total:
        repeats = number(1)
        length = number(sizes[number(2)]) + 1
        if repeats:
            values[done : done + length] = number(width)
        else:
            values[done : done + length] = [number(width) for _ in range(min(length, total - done))]
        done += length
    return values


def _image_of(data: Any) -> str:
    """The URL of a task's image: under the name that templates give it, or the first that ends like one."""
    if not isinstance(data, dict):
        return ""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    named = next((texts[key] for key in ("image", "img", "url", "photo") if texts.get(key)), "")
    return named or next((v for v in texts.values() if urlsplit(v).path.lower().endswith(IMAGE_SUFFIXES)), "")


def _place(images: Path, url: str) -> Place:
    """Uploads have a prefix before their names; files of a local storage stand in the query."""
    local = parse_qs(urlsplit(url).query).get("d")
    name = local[0] if local else urlsplit(url).path if url.startswith("/data/") else url
    base = name.replace("\\", "/").rpartition("/")[2]
    places = [find_image(images, n) for n in (name.lstrip("/"), base, _UPLOAD_PREFIX.sub("", base))]
    return next((p for p in places if not p.problem and p.path.is_file()), places[1])
