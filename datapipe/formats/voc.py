"""Pascal VOC's folders: an XML file of boxes for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from datapipe.decoding import IMAGE_SUFFIXES, upright_size
from datapipe.formats.labels import Faults, LabeledImage, LabeledObject, Place, find_image, fractions, spoken
from subject_diffusion.errors import one_line


def read_voc(files: Sequence[Path], images: Path, faults: Faults) -> Iterator[LabeledImage]:
    """Reads one image per XML file, in their order. A file that is broken costs its image, an object that is broken
    itself."""
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
        objects = (_object(e, *size_px, f"object {i} of {path}", faults) for i, e in enumerate(root.iter("object"), 1))
        yield LabeledImage(place.path, name, tuple(o for o in objects if o is not None), said)


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
