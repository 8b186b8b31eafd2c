"""Labels of people become a dataset that verifies, streams, and says the same as they did."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from datapipe.schema import Entity, Rejection, Sample, from_table
from datapipe.shards import Store, iter_tables, kept_samples, verify
from tests.conftest import jpeg
from train import Stream, SubjectTransform


def pixels(entity: Entity) -> np.ndarray:
    assert entity.mask is not None
    return coco_mask.decode({"size": list(entity.mask.size), "counts": entity.mask.counts.encode()})


def samples(folder: Path) -> list[Sample]:
    return [s for table in iter_tables(Store(str(folder)), "shard") for s in from_table(table)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(60, 40, number))
    return folder


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    square = [[10, 10, 30, 10, 30, 20, 10, 20]]
    uncompressed = {"size": [40, 60], "counts": [0, 40, 2360]}
    tree = {
        "licenses": [{"id": 4, "name": "CC BY 2.0"}],
        "images": [
            {"id": 7, "file_name": "1.jpg", "width": 60, "height": 40},
            {"id": 3, "file_name": "0.jpg", "width": 60, "height": 40, "license": 4, "coco_url": "http://x/0.jpg"},
            {"id": 9, "file_name": "gone.jpg", "width": 60, "height": 40},
            {"id": 8, "file_name": "2.jpg", "width": 60, "height": 40},
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "fire hydrant"}],
        "annotations": [
            {"image_id": 3, "category_id": 1, "bbox": [10, 10, 20, 10], "segmentation": square, "iscrowd": 0},
            {"image_id": 3, "category_id": 2, "bbox": [0, 0, 1, 40], "segmentation": uncompressed, "iscrowd": 0},
            {"image_id": 7, "category_id": 2, "bbox": [5, 5, 10, 10], "segmentation": [], "iscrowd": 0},
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "segmentation": uncompressed, "iscrowd": 1},
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(tree))
    return path


def test_coco_is_read_with_its_masks_and_the_dataset_trains(sdd, coco, images, tmp_path):
    out = tmp_path / "out"
    code, _, error = sdd("import", coco, "--images", images, "--out", out, "--slice-rows", "2")
    assert code == 0, error
    assert list(verify(Store(str(out)))) == []
    first, second = kept_samples(Store(str(out)))
    assert (first.caption, first.url, first.licence) == (
        "a photo of a dog and a fire hydrant", "http://x/0.jpg", "CC BY 2.0"
    )  # fmt: skip
    assert [e.tag for e in first.entities] == ["dog", "fire hydrant"]
    assert [first.caption[slice(*e.span)] for e in first.entities] == ["dog", "fire hydrant"]
    assert first.entities[0].box == (10, 10, 30, 20)
    assert pixels(first.entities[0])[10:20, 10:30].mean() > 0.9
    assert pixels(first.entities[1])[:, 0].all()
    assert [e.mask for e in second.entities] == [None]
    lost = [(s.verdict.reason.value, s.verdict.detail) for s in samples(out) if s.verdict.reason]
    assert lost == [
        ("too_few_entities", "no object has a label"),
        ("unreadable", "gone.jpg: No such file or directory"),
    ]
    transform = SubjectTransform(size_px=32, max_subjects=2)
    (batch,) = Stream(str(out), 2, transform, mode="evaluate", cache=tmp_path / "cache")
    assert batch["present"].any(dim=1).all()


def test_the_caption_that_names_most_is_taken_and_unnamed_objects_are_refused(sdd, coco, images, tmp_path):
    captions = tmp_path / "captions.json"
    told = [{"image_id": 3, "caption": "An animal outside."}, {"image_id": 3, "caption": "A Dog runs. "}]
    captions.write_text(json.dumps({"annotations": told}))
    assert sdd("import", coco, "--images", images, "--captions", captions, "--out", tmp_path / "out")[0] == 0
    first = next(kept_samples(Store(str(tmp_path / "out"))))
    assert (first.caption, first.caption_model) == ("A Dog runs.", "people")
    assert [(c.tag, c.rejected) for c in first.candidates] == [("dog", None), ("fire hydrant", Rejection.LABEL)]


@pytest.fixture
def openimages(tmp_path: Path) -> list[str]:
    header = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    lines = [
        "1,x,/m/dog,1,0.1,0.5,0.2,0.8,0,0,0,0,0",
        "1,x,/m/cat,1,0.5,0.9,0.0,1.0,0,0,0,0,0",
        "1,x,/m/cat,1,0.0,0.9,0.0,1.0,0,0,1,0,0",
        "0,x,/m/cat,1,0.25,0.75,0.25,0.75,0,0,0,0,0",
    ]
    (tmp_path / "boxes.csv").write_text("\n".join([header, *lines]) + "\n")
    (tmp_path / "classes.csv").write_text("/m/dog,Dog\n/m/cat,Cat\n")
    masks = tmp_path / "masks"
    (masks / "a").mkdir(parents=True)
    mask = np.zeros((20, 30), np.uint8)
    mask[4:16, 3:15] = 255
    cv2.imwrite(str(masks / "a" / "m.png"), mask)
    (masks / "masks.csv").write_text(
        "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks\n"
        "m.png,1,/m/dog,b,0.1005,0.4995,0.2,0.8,0.9,\n"
    )
    return [
        str(tmp_path / "boxes.csv"), "--classes", str(tmp_path / "classes.csv"), "--masks", str(masks / "masks.csv")
    ]  # fmt: skip


def test_open_images_tables_are_read_with_their_masks(sdd, openimages, images, tmp_path):
    out = tmp_path / "out"
    code, _, error = sdd("import", *openimages, "--images", images, "--out", out)
    assert code == 0, error
    assert list(verify(Store(str(out)))) == []
    zero, one = kept_samples(Store(str(out)))
    assert [e.tag for e in zero.entities] == ["cat"]
    assert zero.entities[0].box == pytest.approx((15, 10, 45, 30))
    assert sorted(e.tag for e in one.entities) == ["cat", "dog"]
    dog = next(e for e in one.entities if e.tag == "dog")
    assert dog.box == pytest.approx((6, 8, 30, 32))
    assert pixels(dog)[8:32, 6:30].all()
    assert pixels(dog).sum() == 24 * 24


def test_what_sdd_export_wrote_comes_back_as_it_was(sdd, made, tmp_path):
    assert sdd("export", made.folder, "--to", "coco", "--out", tmp_path / "coco")[0] == 0
    code, _, error = sdd(
        "import", tmp_path / "coco/annotations.json", "--images", tmp_path / "coco/images", "--out", tmp_path / "back"
    )
    assert code == 0, error
    before, after = kept_samples(made.store), kept_samples(Store(str(tmp_path / "back")))
    for old, new in zip(before, after, strict=True):
        assert new.image == old.image
        assert [(e.tag, e.mask) for e in new.entities] == [(e.tag, e.mask) for e in old.entities]
        assert np.allclose([e.box for e in new.entities], [e.box for e in old.entities])


def test_killed_and_run_again_it_does_what_is_missing(sdd, coco, images, tmp_path):
    out = tmp_path / "out"
    command = ("import", coco, "--images", images, "--out", out, "--slice-rows", "1")
    assert sdd(*command)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith("shard")}
    (out / "shard-000001.json").unlink()
    assert sdd(*command)[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith("shard")} == before


def test_labels_that_cannot_be_used_are_one_line(refused, coco, openimages, images, tmp_path):
    out = ("--images", images, "--out", tmp_path / "out")
    assert "cannot be read" in refused("import", tmp_path / "none.json", *out)
    (tmp_path / "list.json").write_text("[]")
    assert "not COCO's JSON" in refused("import", tmp_path / "list.json", *out)
    (tmp_path / "half.json").write_text('{"annotations": [{"image_id": 1}], "images": [], "categories": []}')
    (tmp_path / "bad.json").write_text('{"annotations": [], "images": [{}], "categories": []}')
    assert "not COCO's instances" in refused("import", tmp_path / "bad.json", *out)
    assert "need their class descriptions" in refused("import", openimages[0], *out)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert "not Open Images'" in refused("import", tmp_path / "other.csv", "--classes", openimages[2], *out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bbox": [10, 10, 0, 5]}, "box (10.0, 10.0, 10.0, 15.0) lies outside"),
        ({"bbox": [90, 10, 20, 5]}, "lies outside"),
        ({"bbox": [float("nan"), 10, 20, 5]}, "lies outside"),
        ({"segmentation": {"size": [40, 60], "counts": "zzzzzz~~~"}}, "run lengths do not fill its size"),
        ({"segmentation": {"size": [40, 60], "counts": ""}}, "run lengths do not fill its size"),
        (
            {"segmentation": {"size": [10**6, 10**6], "counts": "0"}},
            "mask of 1000000 x 1000000 pixels",
        ),
        ({"segmentation": {"size": [20, 30], "counts": "~~~"}}, "mask of 30 x 20 pixels on an image of 60 x 40"),
        ({"segmentation": [[]]}, "run lengths do not fill its size"),
        ({"segmentation": [[1, 2]]}, "run lengths do not fill its size"),
    ],
)
def test_an_object_that_cannot_be_fails_its_image_and_no_other(sdd, coco, images, tmp_path, change, said):
    tree = json.loads(coco.read_text())
    tree["annotations"][0] |= change
    coco.write_text(json.dumps(tree))
    out = tmp_path / "out"
    assert sdd("import", coco, "--images", images, "--out", out)[0] == 0
    assert list(verify(Store(str(out)))) == []
    assert [s.row for s in kept_samples(Store(str(out)))] == [1]
    (verdict,) = [s.verdict for s in samples(out) if s.row == 0]
    assert (verdict.outcome.value, verdict.reason.value) == ("failed", "error")
    assert said in verdict.detail


def test_labels_of_an_image_as_it_lay_before_it_was_turned_are_not_taken_for_upright_ones(sdd, coco, images, tmp_path):
    image = Image.open(images / "0.jpg")
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(images / "0.jpg", exif=turned)
    assert sdd("import", coco, "--images", images, "--out", tmp_path / "out")[0] == 0
    (verdict,) = [s.verdict for s in samples(tmp_path / "out") if s.row == 0]
    assert verdict.detail == "the labels are of 60 x 40 pixels, the upright image has 40 x 60"


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/passwd"])
def test_labels_reach_no_file_outside_of_the_folder_of_images(refused, coco, images, tmp_path, name):
    (tmp_path / "outside.jpg").write_bytes(jpeg(60, 40))
    tree = json.loads(coco.read_text())
    tree["images"][1]["file_name"] = name
    coco.write_text(json.dumps(tree))
    assert f"{name}: the labels name an image outside of {images}" in refused(
        "import", coco, "--images", images, "--out", tmp_path / "out"
    )


def test_shards_of_other_labels_are_not_gone_on_with(sdd, refused, coco, images, tmp_path):
    command = ("import", coco, "--images", images, "--out", tmp_path / "out")
    assert sdd(*command)[0] == 0
    assert "another --slice-rows" in refused(*command, "--slice-rows", "2")
    tree = json.loads(coco.read_text())
    tree["categories"][0]["name"] = "cat"
    coco.write_text(json.dumps(tree))
    assert "other labels" in refused(*command)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([], "no image is labelled there"),
        ([{"id": 3, "file_name": "0.jpg", "width": 0, "height": 40}], "0 x 40 pixels"),
    ],
)
def test_labels_of_nothing_are_one_line(refused, coco, images, tmp_path, listed, said):
    coco.write_text(json.dumps(json.loads(coco.read_text()) | {"images": listed}))
    assert said in refused("import", coco, "--images", images, "--out", tmp_path / "out")
