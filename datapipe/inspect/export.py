"""A dataset in the formats that other tools read: COCO's JSON with its images, and parquet with the images inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from datapipe.schema import SCHEMA, Sample, to_table
from datapipe.shards import Manifest, Store, manifests, read_slice

COCO_FILE = "annotations.json"
IMAGE_FOLDER = "images"
_ROW_GROUP = 100
"""Rows: a reader that takes one group at a time holds a few MB of images."""


def export_coco(store: Store, out: str) -> Iterator[Manifest]:
    """`annotations.json` and `images/KEY.jpg` in the folder `out`; yields the shards as they are done.

    Entities become annotations with their masks as compressed RLE, their tags categories. What COCO has no place for
    (score, span, predicted_iou, stability) stands in fields of the same name.
    """
    target, images = Store(out), Store(f"{out}/{IMAGE_FOLDER}")
    categories: dict[str, int] = {}
    with target.writing(COCO_FILE) as file:
        # Images and annotations are two lists of one JSON, so the shards are read twice: nothing is held.
        file.write(b'{"info": {"description": "written by sdd export"}, "licenses": [],\n"images": [')
        comma = _Separator(file.write)
        for manifest in manifests(store, "shard"):
            for sample in _kept(store, manifest):
                assert sample.image is not None
                images.put(f"{sample.key}.jpg", sample.image)
                comma(_coco_image(sample))
            yield manifest
        file.write(b'],\n"annotations": [')
        comma = _Separator(file.write)
        for manifest in manifests(store, "shard"):
            for sample in _kept(store, manifest):
                for entity in _coco_annotations(sample, categories):
                    comma(entity | {"id": comma.count + 1})
        file.write(b'],\n"categories": [')
        comma = _Separator(file.write)
        for name, number in categories.items():
            comma({"id": number, "name": name, "supercategory": ""})
        file.write(b"]}\n")


def export_parquet(store: Store, out: str) -> Iterator[Manifest]:
    """One parquet file for each shard with a row for each kept image: the columns of a sidecar, the candidates
    replaced by the entities among them, and `image` as {bytes, path}; yields the shards as they are done."""
    target = Store(out)
    for manifest in manifests(store, "shard"):
        samples = [s.replace(candidates=s.entities) for s in _kept(store, manifest)]
        table = to_table(samples).select([n for n in SCHEMA.names if n not in _SIDECAR_ONLY])
        table = table.rename_columns(["entities" if n == "candidates" else n for n in table.column_names])
        images = [{"bytes": s.image, "path": f"{s.key}.jpg"} for s in samples]
        table = table.append_column(
            "image", pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        )
        with target.writing(f"{manifest.name}.parquet") as file:
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP)
            file.write(sink.getvalue().to_pybytes())
        yield manifest


_SIDECAR_ONLY = {
    "outcome", "stage", "reason", "detail", "retryable", "image_offset", "image_size", "json_offset", "json_size",
}  # fmt: skip


class _Separator:
    """Writes JSON objects, a comma and a line break between them."""

    def __init__(self, write: Callable[[bytes], int]) -> None:
        self._write = write
        self.count = 0

    def __call__(self, tree: dict[str, Any]) -> None:
        self._write((b",\n" if self.count else b"\n") + json.dumps(tree).encode())
        self.count += 1


def _kept(store: Store, manifest: Manifest) -> Iterator[Sample]:
    return (s for s in read_slice(store, manifest).samples if s.image is not None)


def _coco_image(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.row,
        "file_name": f"{sample.key}.jpg",
        "width": sample.width,
        "height": sample.height,
        "coco_url": sample.url,
        "caption": sample.caption,
    }


def _coco_annotations(sample: Sample, categories: dict[str, int]) -> Iterator[dict[str, Any]]:
    """`categories`: numbers by tag; new tags are added."""
    for entity in sample.entities:
        x1, y1, x2, y2 = entity.box
        segmentation: Any = []
        area = (x2 - x1) * (y2 - y1)
        if entity.mask is not None:
            segmentation = {"size": list(entity.mask.size), "counts": entity.mask.counts}
            area = float(coco_mask.area({**segmentation, "counts": entity.mask.counts.encode("ascii")}))
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
