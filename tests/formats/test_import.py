"""Labels of people become a dataset that verifies, streams, and says the same as they did."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from datapipe.schema import Entity, Reason, Rejection, Sample, from_table
from datapipe.shards import Store, iter_tables, kept_samples, verify
from tests.conftest import jpeg
from train import Stream, SubjectTransform


def pixels(entity: Entity) -> NDArray[np.uint8]:
    assert entity.mask is not None
    mask: NDArray[np.uint8] = coco_mask.decode({"size": list(entity.mask.size), "counts": entity.mask.counts.encode()})
    return mask


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
    code, printed, error = sdd("import", coco, "--images", images, "--out", out, "--slice-rows", "2")
    assert code == 0, error
    assert "unreadable" in printed and "too_few_entities" in printed, "the funnel says why images were lost"
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
    lost = [(s.verdict.reason.value, s.verdict.detail) for s in samples(out) if s.verdict and s.verdict.reason]
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


def test_open_images_rows_are_kept_and_what_is_wrong_costs_itself(sdd, openimages, images, tmp_path):
    """Groups, unknown classes, flags that nobody checked, two masks of one box, images in folders as handed out."""
    (images / "train_0").mkdir()
    (images / "2.jpg").rename(images / "train_0/2.jpg")
    (images / "train_f").mkdir()
    (images / "train_f/f.jpg").write_bytes(jpeg(60, 40, 4))
    with (tmp_path / "boxes.csv").open("a") as boxes:
        boxes.write("2,x,/m/cat,1,0.1,0.6,0.1,0.6,0,0,1,0,0\n")  # a group alone
        boxes.write("f,x,/m/dog,1,0.1,0.6,0.1,0.6,-1,-1,-1,-1,-1\n")  # flags unknown
        boxes.write("f,x,/m/dog,1,0.1,0.6,0.1,0.6,-1,-1,-1,-1,-1\n")  # the same box, of another dog
        boxes.write("f,x,/m/none,1,0.1,0.6,0.1,0.6,0,0,0,0,0\n")
        boxes.write("f,x,/m/cat,1,wide,0.6,0.1,0.6,0,0,0,0,0\n")
    with (tmp_path / "masks/masks.csv").open("a") as masks:
        for name in ("n.png", "o.png"):
            masks.write(f"{name},f,/m/dog,b,0.1,0.6,0.1,0.6,0.9,\n")
    for name, row in (("n.png", 3), ("o.png", 9)):
        mask = np.zeros((20, 30), np.uint8)
        mask[row] = 255
        cv2.imwrite(str(tmp_path / "masks/a" / name), mask)
    out = tmp_path / "out"
    code, printed, error = sdd("import", *openimages, "--images", images, "--out", out)
    assert code == 0, error
    assert [(s.url, s.is_kept) for s in samples(out)] == [
        ("0.jpg", True), ("1.jpg", True), ("2.jpg", False), ("f.jpg", True)
    ]  # fmt: skip
    *_, last = kept_samples(Store(str(out)))
    assert [e.tag for e in last.entities] == ["dog", "dog"]
    assert len({e.mask.counts for e in last.entities if e.mask}) == 2, "each box its own mask"
    assert "2 × group" in printed
    assert "1 × annotation of an unknown or nameless class; first: a box of f: /m/none" in printed
    assert "1 × box that is not four numbers" in printed


def test_what_sdd_export_wrote_comes_back_as_it_was(sdd, made, tmp_path):
    assert sdd("export", made.folder, "--to", "coco", "--out", tmp_path / "coco")[0] == 0
    code, _, error = sdd(
        "import", tmp_path / "coco/annotations.json", "--images", tmp_path / "coco/images", "--out", tmp_path / "back"
    )
    assert code == 0, error
    before, after = kept_samples(made.store), kept_samples(Store(str(tmp_path / "back")))
    for old, new in zip(before, after, strict=True):
        assert (new.image, new.caption, new.caption_model) == (old.image, old.caption, old.caption_model)
        assert [(e.tag, e.mask) for e in new.entities] == [(e.tag, e.mask) for e in old.entities]
        assert np.allclose([e.box for e in new.entities], [e.box for e in old.entities])


def test_killed_and_run_again_it_does_what_is_missing(sdd, coco, images, tmp_path):
    out = tmp_path / "out"
    command = ("import", coco, "--images", images, "--out", out, "--slice-rows", "1")
    assert sdd(*command)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith("shard")}
    (out / "shard-000001.manifest.json").unlink()
    assert sdd(*command)[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith("shard")} == before


def test_labels_that_cannot_be_used_are_one_line(refused, coco, openimages, images, tmp_path):
    out = ("--images", images, "--out", tmp_path / "out")
    assert "cannot be read" in refused("import", tmp_path / "none.json", *out)
    (tmp_path / "list.json").write_text("[]")
    assert "no task in it" in refused("import", tmp_path / "list.json", *out)
    (tmp_path / "dict.json").write_text("{}")
    assert "not COCO's JSON" in refused("import", tmp_path / "dict.json", *out)
    (tmp_path / "captions.json").write_text('{"annotations": [{"caption": "a dog"}]}')
    assert "its annotations are captions" in refused("import", tmp_path / "captions.json", *out)
    (tmp_path / "labels.zip").write_bytes(b"PK")
    assert "unpack archives first" in refused("import", tmp_path / "labels.zip", *out)
    (tmp_path / "bad.json").write_text('{"annotations": [{}], "images": [{}], "categories": []}')
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
        ({"bbox": None, "segmentation": None}, "annotation without a box"),
        ({"bbox": [1, 2], "segmentation": None}, "annotation without a box"),
        ({"category_id": 77}, "unknown or nameless category; first: annotation 5 of 0.jpg: 77"),
        ({"category_id": None}, "unknown or nameless category"),
        ({"segmentation": {"size": [40, 60], "counts": "zzzzzz~~~"}}, "run lengths do not fill its size"),
        ({"segmentation": {"size": [40, 60], "counts": ""}}, "run lengths do not fill its size"),
        ({"segmentation": {"size": [10**6, 10**6], "counts": "0"}}, "mask of 1000000 x 1000000 pixels"),
        ({"segmentation": {"size": [20, 30], "counts": "~~~"}}, "mask of 30 x 20 pixels on an image of 60 x 40"),
        ({"segmentation": {"size": [60, 40], "counts": [0, 2400]}}, "mask of 40 x 60 pixels on an image of 60 x 40"),
        ({"segmentation": {"size": [40, 60], "counts": [400, 10]}}, "run lengths of 410 pixels on 60 x 40"),
        ({"segmentation": {"size": [40, 60]}}, "annotation whose mask cannot be read"),
        ({"segmentation": [[]]}, "polygon of fewer than three points"),
        ({"segmentation": [[1, 2]]}, "polygon of fewer than three points"),
        ({"segmentation": [[10, 10, 30, 20]]}, "polygon of fewer than three points"),
        ({"segmentation": [["a", 2, 3, 4, 5, 6]]}, "annotation whose mask cannot be read"),
        ({"segmentation": [[5, 5, 5.2, 5, 5.2, 5.2]]}, "its mask is empty"),
    ],
)
def test_an_object_that_cannot_be_costs_itself_and_is_named(sdd, coco, images, tmp_path, change, said):
    tree = json.loads(coco.read_text())
    tree["annotations"][0] |= change | {"id": 5}
    coco.write_text(json.dumps(tree))
    out = tmp_path / "out"
    code, printed, error = sdd("import", coco, "--images", images, "--out", out)
    assert code == 0, error
    assert list(verify(Store(str(out)))) == []
    first, second = kept_samples(Store(str(out)))
    assert [e.tag for e in first.entities] == [e.tag for e in second.entities] == ["fire hydrant"]
    lines = [line for line in printed.splitlines() if line.startswith("labels: ")]
    assert any(said in line and "1 ×" in line and "annotation 5 of 0.jpg" in line for line in lines), printed


@pytest.mark.parametrize(
    ("change", "box", "mask_pixels"),
    [
        ({"bbox": [-1, -1, 62, 42]}, (0, 0, 60, 40), 200),
        ({"bbox": None}, (10, 10, 30, 20), 200),
        ({"bbox": []}, (10, 10, 30, 20), 200),
        ({"category_id": "1"}, (10, 10, 30, 20), 200),
        ({"category_id": 1.0}, (10, 10, 30, 20), 200),
        ({"segmentation": [[10, 10, 30, 10, 30, 20, 10, 20], [40, 5]]}, (10, 10, 30, 20), 200),
        ({"segmentation": [[10, 10, 1e12, 10, 1e12, 20, 10, 20]]}, (10, 10, 30, 20), 500),
        ({"segmentation": {"size": [40.0, 60.0], "counts": [0, 2400]}}, (10, 10, 30, 20), 2400),
    ],
)
def test_what_can_be_mended_is_kept(sdd, coco, images, tmp_path, change, box, mask_pixels):
    tree = json.loads(coco.read_text())
    tree["annotations"][0] |= change
    coco.write_text(json.dumps(tree))
    assert sdd("import", coco, "--images", images, "--out", tmp_path / "out")[0] == 0
    dog = next(kept_samples(Store(str(tmp_path / "out")))).entities[0]
    assert (dog.tag, dog.box) == ("dog", box)
    assert dog.mask is not None and dog.mask.area == pytest.approx(mask_pixels, abs=12)


def imported(sdd, tree: dict[str, object], images: Path, out: Path, *more: str | Path) -> tuple[dict[str, str], str]:
    """The tags of every kept image, by url, and what was said."""
    path = out.parent / "labels.json"
    path.write_text(json.dumps(tree), encoding="utf-8-sig")  # with a byte order mark
    code, printed, error = sdd("import", path, "--images", images, "--out", out, *more)
    assert code == 0, error
    assert list(verify(Store(str(out)))) == []
    return {s.url: " ".join(e.tag for e in s.entities) for s in kept_samples(Store(str(out)))}, printed


def simple(*images: dict[str, object], annotations: list[dict[str, object]]) -> dict[str, object]:
    """Each annotation gets a box."""
    boxed = [{"category_id": 1, "bbox": [5, 5, 20, 20], "id": i} | a for i, a in enumerate(annotations)]
    return {"images": list(images), "categories": [{"id": 1, "name": "dog"}], "annotations": boxed}


def test_ids_are_the_same_as_numbers_and_as_texts(sdd, images, tmp_path):
    tree = simple(
        {"id": 0, "file_name": "0.jpg", "width": 60, "height": 40},
        {"id": "1", "file_name": "1.jpg", "width": 60, "height": 40},
        {"id": "x", "file_name": "2.jpg", "width": 60, "height": 40},
        annotations=[{"image_id": "0"}, {"image_id": 1}, {"image_id": "x"}, {"image_id": 99}, {"bbox": []}],
    )
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": [{"image_id": "0", "caption": "My dog"}]}))
    kept, printed = imported(sdd, tree, images, tmp_path / "out", "--captions", tmp_path / "captions.json")
    assert kept == {"0.jpg": "dog", "1.jpg": "dog", "2.jpg": "dog"}
    assert next(kept_samples(Store(str(tmp_path / "out")))).caption == "My dog"
    assert "1 × annotation of an image that is not in the file; first: annotation 3" in printed
    assert "1 × annotation without an image" in printed


def test_an_id_that_two_images_have_labels_neither(sdd, images, tmp_path):
    tree = simple(
        *({"id": 0, "file_name": f"{n}.jpg", "width": 60, "height": 40} for n in range(2)),
        {"id": 2, "file_name": "2.jpg", "width": 60, "height": 40},
        annotations=[{"image_id": 0}, {"image_id": 2}],
    )
    kept, printed = imported(sdd, tree, images, tmp_path / "out")
    assert kept == {"2.jpg": "dog"}
    assert "2 × image whose id another one has, too" in printed
    assert len(samples(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    "name", ["sub\\dir\\0.jpg", "images/sub/dir/0.jpg", "C:\\my\\images\\sub\\dir\\0.jpg", "./sub/dir/0.jpg"]
)
def test_images_are_found_by_the_names_that_other_machines_gave_them(sdd, images, tmp_path, name):
    (images / "sub/dir").mkdir(parents=True)
    (images / "sub/dir/0.jpg").write_bytes(jpeg(60, 40, 9))
    tree = simple({"id": 0, "file_name": name}, {"id": 1, "file_name": "0.jpg"}, annotations=[{"image_id": 0}])
    imported(sdd, tree, images, tmp_path / "out")
    (sample,) = kept_samples(Store(str(tmp_path / "out")))
    assert sample.image == jpeg(60, 40, 9)
    assert sample.url == name
    assert len({s.url for s in samples(tmp_path / "out")}) == 2


def test_lvis_names_images_by_url_and_categories_with_brackets(sdd, images, tmp_path):
    (images / "val2017").mkdir()
    (images / "val2017/7.jpg").write_bytes(jpeg(60, 40, 7))
    tree = simple(
        {"id": 0, "coco_url": "http://images.cocodataset.org/val2017/7.jpg", "width": 60, "height": 40},
        {"id": 1, "coco_url": "http://images.cocodataset.org/train2017/1.jpg", "width": 60, "height": 40},
        annotations=[{"image_id": 0}, {"image_id": 1, "category_id": 2}],
    )
    tree["categories"] = [{"id": 1, "name": "bow_(weapon)"}, {"id": 2, "name": "fire_hydrant"}]
    kept, _ = imported(sdd, tree, images, tmp_path / "out")
    assert list(kept.values()) == ["bow", "fire hydrant"]
    assert next(kept_samples(Store(str(tmp_path / "out")))).caption == "a photo of a bow"


def test_without_sizes_the_images_own_are_taken(sdd, images, tmp_path):
    tree = simple(
        {"id": 0, "file_name": "0.jpg"},
        {"id": 1, "file_name": "1.jpg", "width": None, "height": 0},
        annotations=[{"image_id": 0}, {"image_id": 1}],
    )
    imported(sdd, tree, images, tmp_path / "out")
    assert [s.entities[0].box for s in kept_samples(Store(str(tmp_path / "out")))] == [(5, 5, 25, 25)] * 2


def test_captions_on_the_image_records_are_read(sdd, images, tmp_path):
    tree = simple(
        {"id": 0, "file_name": "0.jpg", "captions": ["nothing", "a wet dog"]},
        {"id": 1, "file_name": "1.jpg", "caption": "one dog, asleep"},
        annotations=[{"image_id": 0}, {"image_id": 1}],
    )
    imported(sdd, tree, images, tmp_path / "out")
    assert [s.caption for s in kept_samples(Store(str(tmp_path / "out")))] == ["a wet dog", "one dog, asleep"]


def test_a_wrong_folder_of_images_stops_the_import_before_it_begins(refused, coco, images, tmp_path):
    (tmp_path / "wrong").mkdir()
    said = refused("import", coco, "--images", tmp_path / "wrong", "--out", tmp_path / "out")
    assert f"none is there (tried {tmp_path}/wrong/0.jpg)" in said and "--images" in said
    assert not list((tmp_path / "out").glob("shard*"))


def test_labels_of_an_image_as_it_lay_before_it_was_turned_are_not_taken_for_upright_ones(sdd, coco, images, tmp_path):
    image = Image.open(images / "0.jpg")
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(images / "0.jpg", exif=turned)
    assert sdd("import", coco, "--images", images, "--out", tmp_path / "out")[0] == 0
    (verdict,) = [s.verdict for s in samples(tmp_path / "out") if s.row == 0]
    assert verdict is not None
    assert verdict.detail == "the labels are of 60 x 40 pixels, the upright image has 40 x 60"


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/passwd", "..\\outside.jpg", ""])
def test_labels_reach_no_file_outside_of_the_folder_of_images(sdd, coco, images, tmp_path, name):
    (tmp_path / "outside.jpg").write_bytes(jpeg(60, 40))
    tree = json.loads(coco.read_text())
    tree["images"][1] |= {"file_name": name, "coco_url": ""}
    coco.write_text(json.dumps(tree))
    out = tmp_path / "out"
    code, printed, _ = sdd("import", coco, "--images", images, "--out", out)
    assert code == 0
    assert [s.row for s in kept_samples(Store(str(out)))] == [1]
    assert "1 × image that cannot be looked for; first: image 3" in printed
    (verdict,) = [s.verdict for s in samples(out) if s.row == 0]
    assert verdict is not None and verdict.reason is Reason.UNREADABLE


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
    [([], "it has no images"), ([{"file_name": "0.jpg"}], "it has no images with an id")],
)
def test_labels_of_nothing_are_one_line(refused, coco, images, tmp_path, listed, said):
    coco.write_text(json.dumps(json.loads(coco.read_text()) | {"images": listed}))
    assert said in refused("import", coco, "--images", images, "--out", tmp_path / "out")
