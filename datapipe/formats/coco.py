"""COCO's JSON, read and written: instances with boxes, polygons or RLE masks, and captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Literal

from pycocotools import mask as coco_mask

from datapipe.formats.folder import new_folder
from datapipe.formats.labels import (
    PEOPLE,
    Corners,
    Faults,
    LabeledImage,
    LabeledObject,
    find_image,
    fractions,
    json_elements,
    polygons_mask,
    spoken,
)
from datapipe.image_file import upright_size
from datapipe.schema import RLE, Sample
from datapipe.shards import Manifest, Store, kept_of, manifests
from datapipe.sources.temporary_database import temporary_database
from subject_diffusion.errors import SourceError, one_line

COCO_FILE = "annotations.json"
IMAGE_FOLDER = "images"


def read_coco(annotations: Path, images: Path, faults: Faults, captions: Path | None = None) -> Iterator[LabeledImage]:
    """Reads images in the order of their ids. Crowds are left out. What is wrong with a record costs that record, and
    is added to `faults`. Raises SourceError where the file is not COCO's at all.

    captions: COCO's file of captions; default: those that the image records hold, as `write_coco` writes them.
    """
    with temporary_database() as database:
        labels = _Labels(database, annotations, captions, faults)
        for record, is_alone in labels.images():
            if is_alone:
                yield _image(record, images, labels, faults)
                continue
            name = str(record.get("file_name"))
            faults.add("image whose id another one has, too", f"image {record['id']} ({name})")
            yield LabeledImage(images / "none", name, problem=f"its id {record['id']} is also another image's")


def write_coco(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes `annotations.json` and `images/KEY.jpg` into the folder `out`; yields the shards as they are done.

    Entities become annotations with their masks as compressed RLE, their tags become categories. What COCO has no
    place for (score, span, predicted_iou, stability, desc, caption, caption_model) stands in fields of the same name.
    """
    categories: dict[str, int] = {}
    with new_folder(out) as folder, folder.writing(COCO_FILE) as file:
        # Images and annotations are two lists of one JSON, so the shards are read twice: nothing is held.
        file.write(b'{"info": {"description": "written by sdd export"}, "licenses": [],\n"images": [')
        comma = _Separator(file.write)
        for manifest in manifests(store, "shard"):
            for sample in kept_of(store, manifest, faults.corrupt):
                assert sample.image is not None
                folder.put(f"{IMAGE_FOLDER}/{sample.key}.jpg", sample.image)
                comma(_image_record(sample))
            yield manifest
        file.write(b'],\n"annotations": [')
        comma = _Separator(file.write)
        for manifest in manifests(store, "shard"):
            for sample in kept_of(store, manifest, Faults().corrupt):
                for entity in _annotation_records(sample, categories):
                    comma(entity | {"id": comma.count + 1})
        file.write(b'],\n"categories": [')
        comma = _Separator(file.write)
        for name, number in categories.items():
            comma({"id": number, "name": name, "supercategory": ""})
        file.write(b"]}\n")


class _Labels:
    """The records of a file: the names of categories and licenses by id, and in a database, because they are many,
    images, annotations and captions."""

    def __init__(self, database: Connection, annotations: Path, captions: Path | None, faults: Faults) -> None:
        """Reads the files. Raises SourceError where they are not COCO's."""
        self.names: dict[str, str] = {}
        self.licenses: dict[str, str] = {}
        self._database = database
        self._database.execute("CREATE TABLE images (place, key, record, PRIMARY KEY (place, record)) WITHOUT ROWID")
        self._database.execute("CREATE TABLE annotations (image, record)")
        self._database.execute("CREATE TABLE captions (image, record)")
        first = self._add_all(annotations, faults)
        for name, told in json_elements(captions) if captions else ():
            if name == "annotations" and isinstance(told, dict) and told.get("caption"):
                self._add("captions", told)
        self._database.execute("CREATE INDEX keys ON images (key)")
        self._database.execute("CREATE INDEX annotated ON annotations (image)")
        self._database.execute("CREATE INDEX captioned ON captions (image)")
        some_image = self._database.execute("SELECT 1 FROM images LIMIT 1").fetchone()
        if not some_image or not self.names:
            raise SourceError(f"{annotations}: not COCO's instances: {_lacks(first, bool(some_image))}")
        for annotation in self._records("SELECT record FROM annotations WHERE image NOT IN (SELECT key FROM images)"):
            faults.add("annotation of an image that is not in the file", _name(annotation))

    def images(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Every image's record, in the order of their ids, and whether no other one has its id."""
        query = "SELECT record, (SELECT count(*) FROM images o WHERE o.key = i.key) = 1 FROM images i ORDER BY place"
        for record, is_alone in self._database.execute(query):
            yield json.loads(record), bool(is_alone)

    def annotations(self, image: str) -> Iterator[dict[str, Any]]:
        return self._records("SELECT record FROM annotations WHERE image = ? ORDER BY rowid", image)

    def captions(self, image: str) -> list[str]:
        found = self._records("SELECT record FROM captions WHERE image = ? ORDER BY rowid", image)
        return [str(told["caption"]) for told in found]

    def _add_all(self, annotations: Path, faults: Faults) -> Any:
        """Adds what is in the file of instances; its first annotation."""
        first = None
        for name, record in json_elements(annotations):
            if name == "annotations":
                first = first or record
                if isinstance(record, dict) and record.get("image_id") is not None:
                    self._add("annotations", record)
                else:
                    faults.add("annotation without an image", str(record)[:80])
            elif name == "images":
                if isinstance(record, dict) and record.get("id") is not None:
                    self._database.execute(
                        "INSERT OR IGNORE INTO images VALUES (?, ?, ?)",
                        (_place(record["id"]), _key(record["id"]), json.dumps(record)),
                    )
                else:
                    faults.add("image without an id", str(record)[:80])
            elif name in ("categories", "licenses") and isinstance(record, dict) and record.get("id") is not None:
                names = self.names if name == "categories" else self.licenses
                names[_key(record["id"])] = str(record.get("name") or "")
        if first is None:
            raise SourceError(
                f"{annotations}: not COCO's JSON: it has no annotations; name instances_….json or the like"
            )
        return first

    def _add(self, table: Literal["annotations", "captions"], record: dict[str, Any]) -> None:
        self._database.execute(f"INSERT INTO {table} VALUES (?, ?)", (_key(record.get("image_id")), json.dumps(record)))

    def _records(self, query: str, *of: str) -> Iterator[dict[str, Any]]:
        return (json.loads(record) for (record,) in self._database.execute(query, of))


def _image(record: dict[str, Any], folder: Path, labels: _Labels, faults: Faults) -> LabeledImage:
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
    captions, written_by = labels.captions(_key(record["id"])), PEOPLE
    with_spans = not captions and bool(record.get("caption"))  # our own export's, whose annotations have their spans
    if with_spans:
        captions, written_by = [str(record["caption"])], str(record.get("caption_model") or PEOPLE)
    elif not captions and isinstance(record.get("captions"), list):
        captions = [str(c) for c in record["captions"] if c]
    objects = []
    for annotation in labels.annotations(_key(record["id"])):
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


def _lacks(first: Any, has_images: bool) -> str:
    """What is wrong with a file that lacks images or categories. `first`: its first annotation."""
    if isinstance(first, dict) and "caption" in first:
        return "its annotations are captions; give it with --captions, and the instances in its place"
    return f"it has no {'categories' if has_images else 'images with an id'}; name the file that has them"


def _size(record: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height, where the record says them."""
    try:
        width, height = int(record["width"]), int(record["height"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (width, height) if min(width, height) > 0 else None


def _key(identity: Any) -> str:
    """An id as all records have it: some tools write 7, others "7" or 7.0."""
    key = str(int(identity)) if isinstance(identity, float) and identity.is_integer() else str(identity)
    return key.encode("utf-8", "replace").decode()  # JSON can spell half of a surrogate pair


def _place(identity: Any) -> str:
    """What ids are sorted by: numbers in their order, then texts in theirs."""
    key = _key(identity)
    digits = key.lstrip("0") if key.isascii() and key.isdigit() else None
    return f"text {key}" if digits is None else f"number {len(digits):06} {digits} {key}"


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
            **({} if entity.desc is None else {"desc": entity.desc}),
        }
