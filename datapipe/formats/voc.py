"""Pascal VOC's folders: an XML file of boxes for each image, and PNG files of masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datapipe.formats.labels import (
    Faults,
    LabeledImage,
    LabeledObject,
    Place,
    find_image,
    fractions,
    spoken,
    text_file,
)
from datapipe.image_file import IMAGE_SUFFIXES, upright_size
from datapipe.schema import MAX_PIXELS, RLE
from subject_diffusion.errors import SourceError, one_line

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""VOC's own, by the numbers that they have in SegmentationClass."""
OBJECT_MASKS, CLASS_MASKS, LABEL_MAP = "SegmentationObject", "SegmentationClass", "labelmap.txt"

_NUMBERS = np.arange(256)
_COLORS = np.stack(
    [sum((_NUMBERS >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)], axis=1
)
"""(256, 3) VOC's color of every number: bits 0, 3, 6 of it are the highest ones of red, and so on."""
_MOST_OUTSIDE = 0.5
"""Share of a mask that may lie outside of its object's box. More of it is another object's."""


def read_voc(files: Iterable[Path], images: Path, faults: Faults) -> Iterator[LabeledImage]:
    """Reads one image per XML file, in their order. A file that is broken costs its image, an object that is broken
    itself, and a mask that is broken leaves its object's box.

    Masks are those of `SegmentationObject/NAME.png` beside the folder of the XML files, whose numbers are the objects'
    in their order; where there are none, of `SegmentationClass/NAME.png`, for objects that are alone of their class.
    """
    for path in files:
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError, LookupError) as error:
            faults.add("file that is no XML", f"{path}: {one_line(error)}")
            yield LabeledImage(images / path.stem, path.stem, problem=f"{path.name} is no XML")
            continue
        name = (root.findtext("filename") or path.stem).strip()
        place = _place(images, name, path.stem)
        if place.problem:
            faults.add("image that cannot be looked for", f"{path}: {place.problem}")
            yield LabeledImage(place.path, name, problem=place.problem)
            continue
        said = _size(root)
        size_px = said or upright_size(place.path)
        if size_px is None:  # it is not there, or no image: its own verdict says so
            yield LabeledImage(place.path, name)
            continue
        objects = [_object(e, *size_px, f"object {i} of {path}", faults) for i, e in enumerate(root.iter("object"), 1)]
        yield LabeledImage(place.path, name, tuple(_with_masks(objects, path, size_px, faults)), said)


def voc_masks(files: Iterable[Path]) -> Iterator[Path]:
    """The files of masks, and of what their colors mean, that the boxes in these XML files have."""
    for folder in sorted({path.parent.parent for path in files}):
        yield from (path for path in (folder / LABEL_MAP,) if path.is_file())
    for path in files:
        yield from (mask for mask in _mask_files(path) if mask.is_file())


def _mask_files(path: Path) -> tuple[Path, Path]:
    """Where the masks by object and by class lie of an image whose boxes are in `path`."""
    root, name = path.parent.parent, f"{path.stem}.png"
    return root / OBJECT_MASKS / name, root / CLASS_MASKS / name


def _with_masks(
    objects: Sequence[LabeledObject | None], path: Path, size_px: tuple[int, int], faults: Faults
) -> Iterator[LabeledObject]:
    """The objects that are there, with their masks. `path`: of the XML file, whose objects these are, in its order."""
    by_object, by_class = _mask_files(path)
    numbers: NDArray[np.int64] | None = None
    own: list[int | None] = [None] * len(objects)
    if by_object.is_file():
        numbers, own = _read_numbers(by_object, _COLORS, size_px, faults), [*range(1, len(objects) + 1)]
    elif by_class.is_file():
        classes, colors = _classes(path.parent.parent / LABEL_MAP)
        numbers = _read_numbers(by_class, colors, size_px, faults)
        names = [labeled.name for labeled in objects if labeled is not None]
        own = [classes.get(o.name) if o is not None and names.count(o.name) == 1 else None for o in objects]
    for labeled, number in zip(objects, own, strict=True):
        if labeled is None:
            continue
        if numbers is None or number is None:
            if numbers is not None:
                faults.add("object that its class's mask does not tell apart: the box stays", labeled.where)
            yield labeled
            continue
        mask = numbers == number
        problem = _problem(mask, labeled)
        if problem:
            faults.add(f"{problem}: the box stays", labeled.where)
        yield labeled if problem else replace(labeled, mask=RLE.of(mask))


def _problem(mask: NDArray[np.bool_], labeled: LabeledObject) -> str:
    """Why a mask cannot be that of an object."""
    height, width = mask.shape
    x1, y1, x2, y2 = (round(v * side) for v, side in zip(labeled.box, (width, height) * 2, strict=True))
    inside = np.count_nonzero(mask[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)])
    area = np.count_nonzero(mask)
    if not area:
        return "object without a mask in its image's file of masks"
    return "mask outside of its object's box" if area - inside > _MOST_OUTSIDE * area else ""


def _read_numbers(
    path: Path, colors: NDArray[np.int64], size_px: tuple[int, int], faults: Faults
) -> NDArray[np.int64] | None:
    """(H, W) the number of the object or class that each pixel is of, which is the pixel's palette index or gray level
    or, where a tool wrote colors, the place of its color among `colors` (N, 3). None where there is nothing to read."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.size != size_px or image.width * image.height > MAX_PIXELS:
                there, here = (f"{width} x {height}" for width, height in (image.size, size_px))
                faults.add("masks of another size than their image: the boxes stay", f"{path}: {there}, not {here}")
                return None
            if image.mode in ("P", "L"):
                return np.asarray(image, np.int64)
            pixels = np.asarray(image.convert("RGB"), np.int64) @ (1 << 16, 1 << 8, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        faults.add("file of masks that cannot be read: the boxes stay", f"{path}: {one_line(error)}")
        return None
    known = colors @ (1 << 16, 1 << 8, 1)
    order = np.argsort(known)
    nearest = order[np.searchsorted(known, pixels, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[nearest] == pixels, nearest, -1)


def _classes(path: Path) -> tuple[dict[str, int], NDArray[np.int64]]:
    """Numbers by name, and (N, 3) their colors: VOC's or, where tools wrote a label map, those of its lines such as
    `dog:64,0,128::`. Raises SourceError."""
    if not path.is_file():
        return {spoken(name): number for number, name in enumerate(CLASSES)}, _COLORS
    lines = [line.split(":") for line in text_file(path).splitlines() if line.strip() and not line.startswith("#")]
    try:
        colors = np.array([[int(v) for v in line[1].split(",")] for line in lines], np.int64).reshape(-1, 3)
    except (ValueError, IndexError, OverflowError):
        raise SourceError(f"{path}: no label map (lines such as dog:64,0,128::); mend it, or take it away") from None
    return {spoken(line[0]): number for number, line in enumerate(lines)}, colors


def _place(images: Path, name: str, stem: str) -> Place:
    """By the name that the file says; where there is no such image, by the file's own. People rename the one and not
    the other."""
    place = find_image(images, name)
    if not place.problem and place.path.is_file():
        return place
    for suffix in IMAGE_SUFFIXES:
        for other in (suffix, suffix.upper()):
            by_stem = find_image(images, f"{stem}{other}")
            if by_stem.path.is_file():
                return by_stem
    return place


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Width and height, where the file says them; some tools write 0."""
    try:
        width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if min(width, height) > 0 else None


def _object(element: ElementTree.Element, width: int, height: int, where: str, faults: Faults) -> LabeledObject | None:
    name = spoken(element.findtext("name") or "")
    if not name:
        faults.add("object without a name", where)
        return None
    try:
        x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{c}") or "") for c in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        faults.add("object without a box", where)
        return None
    # VOC counts pixels from 1, and the last one belongs to the object.
    return LabeledObject(name, fractions((x1 - 1, y1 - 1, x2, y2), width, height), where=where)
