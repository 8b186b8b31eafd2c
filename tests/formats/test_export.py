"""Other tools read what was exported, with nothing lost."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datapipe.schema import RLE, Sample, Slice
from datapipe.shards import Store, kept_samples, write_shard
from tests.conftest import kept_sample, rle


@pytest.fixture(scope="module")
def samples(made) -> list[Sample]:
    return list(kept_samples(made.store))


@pytest.fixture
def coco(sdd, made, tmp_path) -> COCO:
    assert sdd("export", made.folder, "--to", "coco", "--out", tmp_path / "coco")[0] == 0
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(tmp_path / "coco" / "annotations.json"))


def test_pycocotools_reads_every_image_box_and_mask(coco, samples, tmp_path):
    assert sorted(coco.getImgIds()) == [s.row for s in samples]
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    for sample in samples:
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[sample.row]))
        assert [names[a["category_id"]] for a in annotations] == [e.tag for e in sample.entities]
        for annotation, entity in zip(annotations, sample.entities, strict=True):
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width, y + height) == pytest.approx(entity.box)
            assert annotation["segmentation"] == {"size": list(entity.mask.size), "counts": entity.mask.counts}
            expected = coco_mask.decode({"size": list(entity.mask.size), "counts": entity.mask.counts.encode()})
            assert np.array_equal(coco.annToMask(annotation), expected)
            assert annotation["area"] == expected.sum()


def test_the_images_lie_beside_the_annotations_as_they_were_stored(coco, samples, tmp_path):
    for sample in samples:
        (image,) = coco.loadImgs([sample.row])
        data = (tmp_path / "coco" / "images" / image["file_name"]).read_bytes()
        assert data == sample.image
        assert Image.open(io.BytesIO(data)).size == (image["width"], image["height"])


def test_parquet_holds_the_images_and_their_entities(sdd, made, samples, tmp_path):
    assert sdd("export", made.folder, "--to", "parquet", "--out", tmp_path / "parquet")[0] == 0
    rows = [r for path in sorted((tmp_path / "parquet").glob("*.parquet")) for r in pq.read_table(path).to_pylist()]
    assert [(r["key"], r["image"]["bytes"], r["caption"]) for r in rows] == [
        (s.key, s.image, s.caption) for s in samples
    ]
    assert [[e["mask"]["counts"] for e in r["entities"]] for r in rows] == [
        [e.mask.counts for e in s.entities] for s in samples
    ]


def test_a_viewer_may_read_a_part_of_the_parquet(sdd, made, tmp_path):
    assert sdd("export", made.folder, "--to", "parquet", "--out", tmp_path)[0] == 0
    for path in tmp_path.glob("*.parquet"):
        metadata = pq.read_metadata(path)
        assert all(metadata.row_group(0).column(i).has_offset_index for i in range(metadata.num_columns))


@pytest.fixture
def yolo(sdd, made, tmp_path) -> Path:
    assert sdd("export", made.folder, "--to", "yolo", "--out", tmp_path / "yolo")[0] == 0
    folder: Path = tmp_path / "yolo"
    return folder


def polygons_of(path: Path, names: dict[int, str], width: int, height: int) -> list[tuple[str, NDArray[np.bool_]]]:
    """Name and filled mask (H, W) of every line, as Ultralytics fills them."""
    found = []
    for line in path.read_text().splitlines():
        number, *values = line.split()
        points = np.array(values, np.float32).reshape(-1, 2)
        assert len(points) >= 3 and points.min() >= 0 and points.max() <= 1
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [(points * (width, height)).astype(np.int32)], 1)
        found.append((names[int(number)], mask.astype(bool)))
    return found


def test_yolo_has_a_file_of_polygons_for_every_image_that_fill_its_masks(yolo, samples):
    names = yaml.safe_load((yolo / "data.yaml").read_text())["names"]
    assert list(names) == list(range(len(names)))
    for sample in samples:
        assert (yolo / f"images/{sample.key}.jpg").read_bytes() == sample.image
        found = polygons_of(yolo / f"labels/{sample.key}.txt", names, sample.width, sample.height)
        assert [name for name, _ in found] == [e.tag for e in sample.entities]
        for (_, mask), entity in zip(found, sample.entities, strict=True):
            true = entity.mask.array()
            assert (mask & true).sum() > 0.98 * (mask | true).sum()


def test_yolo_lists_every_tenth_image_for_validation_and_the_others_for_training(yolo, samples):
    tree = yaml.safe_load((yolo / "data.yaml").read_text())
    listed = {part: (yolo / tree[part]).read_text().splitlines() for part in ("train", "val")}
    places = [f"./images/{sample.key}.jpg" for sample in samples]
    assert listed == {"val": places[::10], "train": [place for i, place in enumerate(places) if i % 10]}


def test_yolo_keeps_parts_that_lie_apart_and_holes(tmp_path, provenance, sdd):
    ring = np.zeros((32, 48), bool)
    ring[4:24, 4:24] = True
    ring[8:20, 8:20] = False
    ring[10:14, 40:46] = True
    entity = kept_sample(0).entities[0]
    masks = {"a ring and a dot": RLE.of(ring), "one pixel": rle(32, 48, (4, 4, 5, 5)), "none": None}
    candidates = tuple(dataclasses.replace(entity, tag=tag, mask=mask) for tag, mask in masks.items())
    work = Slice(0, (kept_sample(0).replace(candidates=candidates),))
    write_shard(Store(str(tmp_path / "set")), "shard", work, provenance)
    assert sdd("export", tmp_path / "set", "--to", "yolo", "--out", tmp_path / "yolo")[0] == 0
    found = polygons_of(tmp_path / "yolo/labels/0000000000.txt", dict(enumerate(masks)), 48, 32)
    (_, joined), (_, single), (_, boxed) = found
    assert joined[ring].all() and not joined[9:19, 9:19].any()
    assert (joined & ~ring).sum() < 25, "a line from one part to the other"
    x1, y1, x2, y2 = map(int, entity.box)
    assert all(box[y1:y2, x1:x2].all() for box in (single, boxed)), "where there is no outline, the box"


def test_what_yolo_was_given_is_imported_again(yolo, samples, sdd, tmp_path):
    words = ("import", yolo / "data.yaml", "--images", yolo / "images", "--out", tmp_path / "again")
    code, _, error = sdd(*words)
    assert code == 0 and "×" not in error
    again = {s.sha256: s for s in kept_samples(Store(str(tmp_path / "again")))}
    for sample in samples:
        assert sorted(e.tag for e in again[hashlib.sha256(sample.image).hexdigest()].entities) == sorted(
            e.tag for e in sample.entities
        )


def test_a_bucket_takes_the_same_bytes(sdd, made, coco, bucket, tmp_path):
    assert sdd("export", made.folder, "--to", "coco", "--out", f"{bucket}/coco")[0] == 0
    assert json.loads(Store(f"{bucket}/coco").read("annotations.json")) == coco.dataset


def test_what_cannot_be_exported_is_said(refused, copied, tmp_path):
    assert "no shards here" in refused("export", tmp_path, "--to", "coco", "--out", tmp_path / "out")
    tar = copied / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    assert "shard-000001.tar" in refused("export", copied, "--to", "coco", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "annotations.json").exists()
