"""Other tools read what was exported, with nothing lost."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datapipe.schema import Sample
from datapipe.shards import Store, kept_samples


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


def test_a_bucket_takes_the_same_bytes(sdd, made, coco, bucket, tmp_path):
    assert sdd("export", made.folder, "--to", "coco", "--out", f"{bucket}/coco")[0] == 0
    assert json.loads(Store(f"{bucket}/coco").read("annotations.json")) == coco.dataset


def test_what_cannot_be_exported_is_said(refused, copied, tmp_path):
    assert "no shards here" in refused("export", tmp_path, "--to", "coco", "--out", tmp_path / "out")
    tar = copied / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    assert "shard-000001.tar" in refused("export", copied, "--to", "coco", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "annotations.json").exists()
