"""COCO's JSON, read and written: instances with boxes, polygons or RLE masks, and captions."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from datapipe.decoding import upright_size
from datapipe.formats.labels import (
    PEOPLE,
    Corners,
    Faults,
    LabeledImage,
    LabeledObject,
    find_image,
    fractions,
    polygons_mask,
    spoken,
    text_file,
)
from datapipe.schema import RLE, Sample
from datapipe.shards import Manifest, Store, kept_of, manifests
from subject_diffusion.errors import SourceError, one_line

COCO_FILE = "annotations.json"
IMAGE_FOLDER = "images"


def read_coco(annotations: Path, images: Path, faults: Faults, captions: Path | None = None) -> Iterator[LabeledImage]:
    """Reads images in the order of their ids. Crowds are left out. What is wrong with a record costs that record, and
    is added to `faults`. Raises SourceError where the file is not COCO's at all.

    captions: COCO's file of captions; default: those that the image records hold, as `write_coco` writes them.
    """
    tree = _read(annotations)
    records = [r for r in _list(tree, "images") if _has_id(r, faults)]
    if not records or not _list(tree, "categories"):
        raise SourceError(f"{annotations}: not COCO's instances: {_lacks(tree)}")
    labels = _Labels.of(tree, faults)
    words = defaultdict(list)
    for told in _list(_read(captions), "annotations") if captions else ():
        if isinstance(told, dict) and told.get("caption"):
            words[_key(told.get("image_id"))].append(str(told["caption"]))
    by_id = Counter(_key(r["id"]) for r in {str(r): r for r in records}.values())
    known = set(by_id)
    for image_id, found in labels.annotations.items():
        if image_id not in known:
            for annotation in found:
                faults.add("annotation of an image that is not in the file", _name(annotation))
    for record in sorted({str(r): r for r in records}.values(), key=lambda r: _order(r["id"])):
        key = _key(record["id"])
        if by_id[key] > 1:
            name = str(record.get("file_name"))
            faults.add("image whose id another one has, too", f"image {record['id']} ({name})")
            yield LabeledImage(images / "none", name, problem=f"its id {record['id']} is also another image's")
        else:
            yield _image(record, images, labels, words[key], faults)


def write_coco(store: Store, out: str) -> Iterator[Manifest]:
    """Writes `annotations.json` and `images/KEY.jpg` into the folder `out`; yields the shards as they are done.

    Entities become annotations with their masks as compressed RLE, their tags become categories. What COCO has no
    place for (score, span, predicted_iou, stability, caption, caption_model) stands in fields of the same name.
    """
    target, images = Store(out), Store(f"{out}/{IMAGE_FOLDER}")
    categories: dict[str, int] = {}
    with target.writing(COCO_FILE) as file:
        # Images and annotations are two lists of one JSON, so the shards are read twice: nothing is held.
        file.write(b'{"info": {"description": "written by sdd export"}, "licenses": [],\n"images": [')
        comma = _Separator(file.write)
        for manifest in manifests(store, "shard"):
            for sample in kept_of(store, manifest):
                assert sample.image is not None
                images.put(f"{sample.key}.jpg", sample.image)
                comma(_image_record(sample))
            yield manifest
        file.write(b'],\n"annotations": [')
        comma = _Separator(file.write)
        for manifest in manifests(store, "shard"):
            for sample in kept_of(store, manifest):
                for entity in _annotation_records(sample, categories):
                    comma(entity | {"id": comma.count + 1})
        file.write(b'],\n"categories": [')
        comma = _Separator(file.write)
        for name, number in categories.items():
            comma({"id": number, "name": name, "supercategory": ""})
        file.write(b"]}\n")


@dataclass(frozen=True)
class _Labels:
    """The file's lists: names of categories and licenses by id, annotations by image."""

    names: dict[str, str]
    licenses: dict[str, str]
    annotations: dict[str, list[dict[str, Any]]]

    @classmethod
    def of(cls, tree: dict[str, Any], faults: Faults) -> _Labels:
        annotations = defaultdict(list)
        for annotation in _list(tree, "annotations"):
            if not isinstance(annotation, dict) or annotation.get("image_id") is None:
                faults.add("annotation without an image", str(annotation)[:80])
            else:
                annotations[_key(annotation["image_id"])].append(annotation)
        return cls(_names(tree, "categories"), _names(tree, "licenses"), annotations)


def _image(record: dict[str, Any], folder: Path, labels: _Labels, captions: list[str], faults: Faults) -> LabeledImage:
    url = str(record.get("coco_url") or record.get("flickr_url") or "")
    name = str(record.get("file_name") or url)  # LVIS has no file names
    place = find_image(folder, name)
    if place.problem or not name:
        faults.add("image that cannot be looked for", f"image {record['id']}: {place.problem or 'without a name'}")
        return LabeledImage(place.path, name, url=url, problem=place.problem or "the labels do not name it")
    size_px = _size(record)
    seen_px = size_px or upright_size(place.path)
    if seen_px is None:  # it is not there, or no image: its own verdict says so
        return LabeledImage(place.path, name, url=url)
    written_by = PEOPLE
    with_spans = not captions and bool(record.get("caption"))  # our own export's, whose annotations have their spans
    if with_spans:
        captions, written_by = [str(record["caption"])], str(record.get("caption_model") or PEOPLE)
    elif not captions and isinstance(record.get("captions"), list):
        captions = [str(c) for c in record["captions"] if c]
    objects = []
    for annotation in labels.annotations.get(_key(record["id"]), ()):
        where = f"{_name(annotation)} of {name}"
        found = _object(annotation, labels.names, *seen_px, where, faults)
        if found is not None and with_spans:  # as they were written, for tags with underscores
            tag = labels.names[_key(annotation["category_id"])]
            found = replace(found, name=tag, span=_span(annotation.get("span")))
        if found is not None:
            objects.append(found)
    licence = labels.licenses.get(_key(record.get("license")), "")
    return LabeledImage(place.path, name, tuple(objects), size_px, captions, written_by, url, licence)


def _object(
    annotation: dict[str, Any], names: dict[str, str], width: int, height: int, where: str, faults: Faults
) -> LabeledObject | None:
    if annotation.get("iscrowd") in (1, "1", True):
        faults.add("crowd", where)
        return None
    name = spoken(names.get(_key(annotation.get("category_id")), ""))
    if not name:
        faults.add("annotation of an unknown or nameless category", f"{where}: {annotation.get('category_id')!r}")
        return None
    try:
        mask = _mask(annotation.get("segmentation"), width, height, where, faults)
        box = _box(annotation.get("bbox"))
        if box is None and mask is not None and mask.area:
            faults.add("annotation without a box: its mask's was taken", where)
            x, y, w, h = coco_mask.toBbox(mask.to_coco()).tolist()
            box = (x, y, x + w, y + h)
    except Exception as error:  # pycocotools has no other type for what it does not know
        faults.add("annotation whose mask cannot be read", f"{where}: {one_line(error)}")
        return None
    if box is None:
        faults.add("annotation without a box", f"{where}: {annotation.get('bbox')!r}")
        return None
    return LabeledObject(name, fractions(box, width, height), mask, where=where)


def _box(bbox: Any) -> Corners | None:
    try:
        x, y, w, h = (float(v) for v in bbox)
    except (TypeError, ValueError):
        return None
    return x, y, x + w, y + h


def _span(span: Any) -> tuple[int, int] | None:
    try:
        start, end = span
        return int(start), int(end)
    except (TypeError, ValueError):
        return None


def _mask(segmentation: Any, width: int, height: int, where: str, faults: Faults) -> RLE | None:
    """One mask of polygons, or of an RLE, packed or not; None where there is none. Raises ValueError where all of it is
    broken."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        # Four numbers are a box to pycocotools, not a polygon of two points.
        polygons = [[float(v) for v in p] for p in segmentation]
        if short := sum(len(p) < 6 or len(p) % 2 for p in polygons):
            faults.add("polygon of fewer than three points", where)
            if short == len(polygons):
                raise ValueError("none of its polygons has three points")
        return polygons_mask(polygons, width, height)
    rows, columns = (int(side) for side in segmentation["size"])
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if sum(counts) != rows * columns or min(counts) < 0:
            raise ValueError(f"run lengths of {sum(counts)} pixels on {columns} x {rows}")
        return RLE.from_coco(coco_mask.frPyObjects({"size": [rows, columns], "counts": counts}, rows, columns))
    return RLE((rows, columns), str(counts))


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(text_file(path))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: cannot be read as JSON ({one_line(error)})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("annotations"), list):
        raise SourceError(f"{path}: not COCO's JSON: it has no list of annotations; name instances_….json or the like")
    return tree


def _lacks(tree: dict[str, Any]) -> str:
    if any(isinstance(a, dict) and "caption" in a for a in _list(tree, "annotations")[:1]):
        return "its annotations are captions; give it with --captions, and the instances in its place"
    lacking = " and ".join(name for name in ("images", "categories") if not _list(tree, name))
    return f"it has no {lacking or 'images with an id'}; name the file that has them"


def _list(tree: dict[str, Any], name: str) -> list[Any]:
    found = tree.get(name)
    return found if isinstance(found, list) else []


def _names(tree: dict[str, Any], of: str) -> dict[str, str]:
    """By id."""
    records = (r for r in _list(tree, of) if isinstance(r, dict))
    return {_key(r["id"]): str(r.get("name") or "") for r in records if r.get("id") is not None}


def _has_id(record: Any, faults: Faults) -> bool:
    if isinstance(record, dict) and record.get("id") is not None:
        return True
    faults.add("image without an id", str(record)[:80])
    return False


def _size(record: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height, where the record says them."""
    try:
        width, height = int(record["width"]), int(record["height"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (width, height) if min(width, height) > 0 else None


def _key(identity: Any) -> str:
    """An id as all records have it: some tools write 7, others "7" or 7.0."""
    return str(int(identity)) if isinstance(identity, float) and identity.is_integer() else str(identity)


def _order(identity: Any) -> tuple[bool, int, str]:
    """Numbers in their order, then texts in theirs."""
    key = _key(identity)
    is_number = key.isascii() and key.isdigit()
    return not is_number, int(key) if is_number else 0, key


def _name(annotation: dict[str, Any]) -> str:
    return f"annotation {annotation.get('id', '(without an id)')}"


class _Separator:
    """Writes JSON objects, a comma and a line break between them."""

    def __init__(self, write: Callable[[bytes], int]) -> None:
        self._write = write
        self.count = 0

    def __call__(self, tree: dict[str, Any]) -> None:
        self._write((b",\n" if self.count else b"\n") + json.dumps(tree).encode())
        self.count += 1


def _image_record(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.row,
        "file_name": f"{sample.key}.jpg",
        "width": sample.width,
        "height": sample.height,
        "coco_url": sample.url,
        "caption": sample.caption,
        "caption_model": sample.caption_model,
    }


def _annotation_records(sample: Sample, categories: dict[str, int]) -> Iterator[dict[str, Any]]:
    """`categories`: numbers by tag; new tags are added."""
    for entity in sample.entities:
        x1, y1, x2, y2 = entity.box
        segmentation: Any = []
        area = (x2 - x1) * (y2 - y1)
        if entity.mask is not None:
            segmentation = {"size": list(entity.mask.size), "counts": entity.mask.counts}
            area = float(entity.mask.area)
        yield {
            "image_id": sample.row,
            "category_id": categories.setdefault(entity.tag, len(categories) + 1),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": area,
            "iscrowd": 0,
            "segmentation": segmentation,
            "score": entity.score,
            "span": list(entity.span),
            "predicted_iou": entity.predicted_iou,
            "stability": entity.stability,
        }
