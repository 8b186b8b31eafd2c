"""COCO's JSON: instances with boxes, polygons or RLE masks, and captions in a file of their own."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from datapipe.errors import SourceError
from datapipe.labelled.images import LabelledImage, LabelledObject, path_in
from datapipe.schema import RLE


def read_coco(annotations: Path, images: Path, captions: Path | None = None) -> Iterator[LabelledImage]:
    """In the order of image ids. Crowds are left out. Raises SourceError."""
    tree, told = _read(annotations), _read(captions) if captions else {"annotations": []}
    try:
        names = {c["id"]: str(c["name"]) for c in tree["categories"]}
        licences = {c["id"]: str(c["name"]) for c in tree.get("licenses", ())}
        objects, words = defaultdict(list), defaultdict(list)
        for annotation in tree["annotations"]:
            if not annotation.get("iscrowd"):
                objects[annotation["image_id"]].append(annotation)
        for caption in told["annotations"]:
            words[caption["image_id"]].append(str(caption["caption"]))
        for image in sorted(tree["images"], key=lambda image: image["id"]):
            size_px = (int(image["width"]), int(image["height"]))
            if min(size_px) < 1:
                raise ValueError(f"image {image['id']} of {size_px[0]} x {size_px[1]} pixels")
            yield LabelledImage(
                path_in(images, str(image["file_name"])),
                tuple(_object(a, names, *size_px) for a in objects[image["id"]]),
                size_px,
                words[image["id"]],
                str(image.get("coco_url") or ""),
                licences.get(image.get("license"), ""),
            )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SourceError(f"{annotations}: not COCO's instances ({type(error).__name__}: {error})") from None


def _object(annotation: dict[str, Any], names: dict[int, str], width: int, height: int) -> LabelledObject:
    x, y, w, h = (float(v) for v in annotation["bbox"])
    box = (x / width, y / height, (x + w) / width, (y + h) / height)
    return LabelledObject(names[annotation["category_id"]], box, _mask(annotation.get("segmentation"), width, height))


def _mask(segmentation: Any, width: int, height: int) -> RLE | None:
    """Of polygons, or of an RLE, packed or not."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        try:
            packed = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        except Exception:  # pycocotools has no other type for what it does not know
            return RLE((height, width), "")  # fills nothing: for this the image's own verdict is "failed"
    elif isinstance(segmentation["counts"], list):
        packed = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rows, columns = segmentation["size"]
        return RLE((int(rows), int(columns)), str(segmentation["counts"]))
    return RLE((packed["size"][0], packed["size"][1]), packed["counts"].decode())


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(tree, dict) or "annotations" not in tree:
        raise SourceError(f"{path}: not COCO's JSON: it has no list of annotations")
    return tree
