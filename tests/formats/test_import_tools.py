"""The labels of YOLO, Pascal VOC, CVAT and Label Studio become a dataset; what is wrong with one costs itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datapipe.schema import Sample
from datapipe.shards import Store, kept_samples, verify
from tests.conftest import jpeg

Box = tuple[float, float, float, float]


def imported(sdd, labels: Path, images: Path, out: Path, *more: str | Path) -> tuple[list[Sample], str]:
    """The kept samples, and what was said."""
    code, printed, error = sdd("import", labels, "--images", images, "--out", out, *more)
    assert code == 0, error
    assert list(verify(Store(str(out)))) == []
    return list(kept_samples(Store(str(out)))), printed


def entities(sample: Sample) -> list[tuple[str, Box]]:
    return sorted((e.tag, tuple(round(v, 3) for v in e.box)) for e in sample.entities)  # type: ignore[misc]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "train").mkdir(parents=True)
    for number in range(3):
        (folder / "train" / f"{number}.jpg").write_bytes(jpeg(60, 40, number))
    return folder


YOLO_LINES = (
    "0 0.5 0.5 0.5 0.5\n"  # a box
    "1 0.25 0.25 0.5 0.5 0.93\n\n"  # with a confidence
    "1 0.0 0.0 0.5 0.0 0.5 0.5 0.0 0.5\n"  # a polygon
    "7 0.5 0.5 0.5 0.5\n"  # a class that has no name
    "0 nan 0.5 0.5 0.5\n"
    "0 0.5 0.5\n"
    "dog 0.5 0.5 0.5 0.5\n"
    "0 5 5 0.1 0.1\n"  # far outside
)
YOLO_ENTITIES = [
    ("dog", (15.0, 10.0, 45.0, 30.0)),
    ("red bus", (0.0, 0.0, 30.0, 20.0)),
    ("red bus", (0.0, 0.0, 30.0, 20.0)),
]


@pytest.fixture(params=["names in data.yaml", "a list in classes.txt", "labels beside the images"])
def yolo(request, images: Path, tmp_path: Path) -> Path:
    """Labels in one of the layouts that tools write; the third image has none."""
    labels = tmp_path / "labels"
    beside = request.param == "labels beside the images"
    where = images / "train" if beside else labels / "train"
    where.mkdir(parents=True, exist_ok=True)
    (where / "0.txt").write_text("\ufeff" + YOLO_LINES, encoding="utf-8")
    (where / "1.txt").write_text("")
    (where / "gone.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    if request.param == "names in data.yaml":
        (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nnames: {0: dog, 1: red_bus}\n")
        return tmp_path / "data.yaml"
    folder = images if beside else labels
    (folder / "classes.txt").write_text("dog\nred_bus\n")
    return folder


def test_yolo_boxes_and_polygons_are_read(sdd, yolo, images, tmp_path):
    (sample,), printed = imported(sdd, yolo, images, tmp_path / "out")
    assert entities(sample) == YOLO_ENTITIES
    (mask,) = [e.mask for e in sample.entities if e.mask]
    assert mask.array()[:20, :30].all() and mask.area == 600
    for said in (
        "3 × line that is no box or polygon; first:", "line 6",
        "1 × annotation of an unknown or nameless class",
        "1 × object with a box outside of its image or without area",
        "1 × image without a file of labels; first: train/2.jpg",
        "1 × file of labels without an image",
    ):  # fmt: skip
        assert said in printed


def test_yolo_keypoints_are_not_taken_for_polygons(sdd, images, tmp_path):
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/0.txt").write_text("0 0.5 0.5 0.5 0.5 0.1 0.1 0.2 0.2 0.3 0.3\n")
    (tmp_path / "data.yaml").write_text("names: [dog]\nkpt_shape: [3, 2]\n")
    (sample,), _ = imported(sdd, tmp_path / "data.yaml", images, tmp_path / "out")
    assert entities(sample) == [("dog", (15.0, 10.0, 45.0, 30.0))]


def test_yolo_without_names_is_one_line(refused, images, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    rest = ("--images", images, "--out", tmp_path / "out")
    assert "--classes" in refused("import", tmp_path / "labels", *rest)
    (tmp_path / "data.yaml").write_text("train: images\n")
    assert "no list of `names`" in refused("import", tmp_path / "data.yaml", *rest)
    (tmp_path / "empty").mkdir()
    assert "check the path" in refused("import", tmp_path / "empty", *rest)


def voc(name: str, objects: str, size: str = "<width>60</width><height>40</height>") -> str:
    return f"<annotation><filename>{name}</filename><size>{size}<depth>3</depth></size>{objects}</annotation>"


def voc_object(name: str, *corners: object) -> str:
    box = "".join(f"<{tag}>{v}</{tag}>" for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False))
    return f"<object><name>{name}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"


def test_pascal_voc_boxes_are_read(sdd, images, tmp_path):
    labels = tmp_path / "Annotations"
    labels.mkdir()
    objects = [
        voc_object("dog", 1, 1, 30, 20), voc_object("cat", 31.0, 21.0, 60.0, 40.0), voc_object("", 1, 1, 9, 9),
        voc_object("dog", 1, 1, 9), voc_object("dog", 70, 1, 99, 9), voc_object("dog", "x", 1, 9, 9),
    ]  # fmt: skip
    (labels / "0.xml").write_text(voc("train/0.jpg", "".join(objects)))
    # Renamed since, and of a size that nobody wrote down.
    (labels / "1.xml").write_text(voc("IMG_1234.JPG", voc_object("dog", 1, 1, 60, 40), "<width>0</width>"))
    (labels / "2.xml").write_text("<annotation><filename>")
    (labels / "3.xml").write_text(voc("../../etc/passwd", voc_object("dog", 1, 1, 60, 40)))
    (images / "1.jpg").write_bytes(jpeg(60, 40, 5))
    (first, second), printed = imported(sdd, labels, images, tmp_path / "out")
    assert entities(first) == [("cat", (30.0, 20.0, 60.0, 40.0)), ("dog", (0.0, 0.0, 30.0, 20.0))]
    assert entities(second) == [("dog", (0.0, 0.0, 60.0, 40.0))]
    for said in (
        "1 × object without a name", "2 × object without a box", "1 × object with a box outside of its image",
        "1 × file that is no XML", "1 × image that cannot be looked for",
    ):  # fmt: skip
        assert said in printed


def voc_colors(numbers: np.ndarray[Any, Any]) -> Image.Image:
    """(H, W) numbers as the PNG files of the VOC challenge have them: palette indices, in colors of their bits."""
    palette = np.zeros((256, 3), np.uint8)
    for number in range(256):
        for bit in range(8):
            for channel in range(3):
                palette[number, channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    image.putpalette(palette.tobytes())
    return image


@pytest.fixture
def voc_folder(images, tmp_path: Path) -> Path:
    """A folder as VOC's archives have it: a dog, an object that is broken, a dining table, and another dog."""
    objects = [
        voc_object("dog", 1, 1, 20, 20), voc_object("", 1, 1, 9, 9), voc_object("diningtable", 31, 21, 60, 40),
        voc_object("dog", 41, 1, 60, 10),
    ]  # fmt: skip
    for folder in ("Annotations", "SegmentationObject", "SegmentationClass"):
        (tmp_path / "VOC2012" / folder).mkdir(parents=True)
    (tmp_path / "VOC2012/Annotations/0.xml").write_text(voc("train/0.jpg", "".join(objects)))
    return tmp_path / "VOC2012"


def drawn(numbers: dict[int, tuple[slice, slice]], shape: tuple[int, int] = (40, 60)) -> np.ndarray[Any, Any]:
    """(H, W) with these numbers in these places, bordered by VOC's 255 for pixels that nobody decided about."""
    found = np.zeros(shape, np.uint8)
    for number, place in numbers.items():
        found[place] = number
    found[:, -1] = 255
    return found


DOG, TABLE = np.s_[2:18, 2:18], np.s_[22:38, 32:58]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
@pytest.mark.parametrize("given", ["VOC2012/Annotations", "VOC2012"])
def test_pascal_voc_masks_by_object_are_read(sdd, voc_folder, images, tmp_path, mode, given):
    numbers = drawn({1: DOG, 3: TABLE, 4: np.s_[30:36, 2:8]})
    image = Image.fromarray(numbers) if mode == "L" else voc_colors(numbers).convert(mode)
    image.save(voc_folder / "SegmentationObject/0.png")
    image.save(voc_folder / "SegmentationClass/0.png")  # not looked at, since there is a better one
    (sample,), printed = imported(sdd, tmp_path / given, images, tmp_path / "out")
    masks = [(e.tag, e.mask and e.mask.array()) for e in sorted(sample.entities, key=lambda e: (e.tag, e.box[0]))]
    assert [tag for tag, _ in masks] == ["diningtable", "dog", "dog"]
    for (_, mask), number in zip(masks, (3, 1, None), strict=True):
        np.testing.assert_array_equal(mask, None if number is None else numbers == number)
    assert "1 × mask outside of its object's box: the box stays; first: object 4 of" in printed


@pytest.mark.parametrize(
    "label_map", [None, "# label:color_rgb:parts:actions\nbackground:0,0,0::\ndiningtable:9,9,7::\n"]
)
def test_pascal_voc_masks_by_class_are_read_where_an_object_is_alone_of_its_class(
    sdd, voc_folder, images, tmp_path, label_map
):
    numbers = drawn({11: TABLE, 12: DOG})
    image = voc_colors(numbers)
    if label_map is not None:
        (voc_folder / "labelmap.txt").write_text(label_map)
        pixels = np.array(image.convert("RGB"))
        pixels[numbers == 11] = (9, 9, 7)
        image = Image.fromarray(pixels)
    image.save(voc_folder / "SegmentationClass/0.png")
    (sample,), printed = imported(sdd, voc_folder, images, tmp_path / "out")
    masks = {e.tag: e.mask for e in sample.entities}
    table = masks["diningtable"]
    assert table is not None and masks["dog"] is None
    np.testing.assert_array_equal(table.array(), numbers == 11)
    assert "2 × object that its class's mask does not tell apart: the box stays" in printed


def test_pascal_voc_masks_that_cannot_be_used_leave_the_boxes(sdd, voc_folder, images, tmp_path):
    path = voc_folder / "SegmentationObject/0.png"
    for number, (said, write) in enumerate(
        [
            ("file of masks that cannot be read", lambda: path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")),
            ("masks of another size than their image", lambda: voc_colors(drawn({1: DOG}, (20, 30))).save(path)),
            ("object without a mask", lambda: voc_colors(drawn({})).save(path)),
        ]
    ):
        write()
        (sample,), printed = imported(sdd, voc_folder, images, tmp_path / f"out{number}")
        assert [e.mask for e in sample.entities] == [None] * 3
        assert said in printed


def test_pascal_voc_with_other_masks_or_a_broken_label_map_is_one_line(refused, sdd, voc_folder, images, tmp_path):
    path = voc_folder / "SegmentationClass/0.png"
    command = ("import", voc_folder, "--images", images, "--out", tmp_path / "out")
    voc_colors(drawn({12: DOG})).save(path)
    assert sdd(*command)[0] == 0
    voc_colors(drawn({11: TABLE})).save(path)
    assert "other labels" in refused(*command)
    (voc_folder / "labelmap.txt").write_text("dog\n")
    assert "no label map" in refused(*command[:-1], tmp_path / "another")


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<image id="0" name="train/0.jpg" width="60" height="40">
  <box label="dog" xtl="10" ytl="10" xbr="30" ybr="20" z_order="0"></box>
  <box label="dog" xtl="20" ytl="15" xbr="40" ybr="25" rotation="90"></box>
  <polygon label="cat" points="0,0;20,0;20,10;0,10"></polygon>
  <mask label="fire_hydrant" rle="1, 2, 1, 2" left="50" top="30" width="3" height="2"></mask>
  <mask label="dog" rle="1, 2" left="50" top="30" width="3" height="2"></mask>
  <polygon label="cat" points="0,0;20,0"></polygon>
  <box label="dog" xtl="ten" ytl="10" xbr="30" ybr="20"></box>
  <box label="" xtl="1" ytl="10" xbr="30" ybr="20"></box>
  <polyline label="road" points="0,0;1,1"></polyline>
  <tag label="sunny"></tag>
</image>
<image id="1" name="train/1.jpg" width="60" height="40"></image>
</annotations>
"""


def test_cvat_boxes_polygons_and_masks_are_read(sdd, images, tmp_path):
    (tmp_path / "annotations.xml").write_text(CVAT)
    (sample,), printed = imported(sdd, tmp_path / "annotations.xml", images, tmp_path / "out")
    assert entities(sample) == [
        ("cat", (0.0, 0.0, 20.0, 10.0)),
        ("dog", (10.0, 10.0, 30.0, 20.0)),
        ("dog", (25.0, 10.0, 35.0, 30.0)),
        ("fire hydrant", (50.0, 30.0, 53.0, 32.0)),
    ]
    masks = {e.tag: e.mask.array() for e in sample.entities if e.mask}
    np.testing.assert_array_equal(masks["fire hydrant"][30:32, 50:53], [[0, 1, 1], [0, 1, 1]])
    assert masks["fire hydrant"].sum() == 4
    assert masks["cat"][:10, :20].all()
    for said in ("3 × shape that cannot be read", "1 × shape without a label", "kind without area (polyline)"):
        assert said in printed


def test_other_files_of_cvat_are_one_line(refused, images, tmp_path):
    path = tmp_path / "annotations.xml"
    for text, said in (
        ("<annotations><track><box/></track></annotations>", "CVAT for images 1.1"),
        (CVAT[:300], "not whole XML"),
        ("<annotation></annotation>", "Pascal VOC"),
    ):
        path.write_text(text)
        assert said in refused("import", path, "--images", images, "--out", tmp_path / "out")


def brush(mask: np.ndarray[Any, Any]) -> list[int]:
    """A mask (H, W) as Label Studio's brush has it: RGBA bytes in blocks of equal and of differing values."""
    values = np.repeat(mask.ravel() * 255, 4)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    bits += "0" + "01" + f"{7:04b}" + "".join(f"{v:08b}" for v in values[:8])  # eight values, each by itself
    edges = [8, *(8 + np.flatnonzero(np.diff(values[8:])) + 1), len(values)]
    for start, end in itertools.pairwise(edges):
        bits += "1" + "11" + f"{end - start - 1:016b}" + f"{values[start]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


def region(kind: str, value: dict[str, Any], label: str = "dog") -> dict[str, Any]:
    sizes = {"original_width": 60, "original_height": 40}
    return {"id": "r", "type": kind, "value": value | {kind: [label]}, **sizes}


def test_label_studio_regions_are_read(sdd, images, tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:10, 20:30] = 1
    square = {"x": 50, "y": 50, "width": 25, "height": 25}
    regions = [
        region("rectanglelabels", square | {"rotation": 0}),
        region("rectanglelabels", square | {"rotation": 90}, "cat"),
        region("polygonlabels", {"points": [[0, 0], [50, 0], [50, 50], [0, 50]]}, "bus"),
        region("brushlabels", {"format": "rle", "rle": brush(mask)}, "bird"),
        region("brushlabels", {"format": "rle", "rle": brush(mask)[:9]}),
        region("polygonlabels", {"points": [[0, 0], [50, 0]]}),
        region("rectanglelabels", {"x": 1}),
        {"id": "c", "type": "choices", "value": {"choices": ["indoors"]}},
    ]
    tasks = [
        {"id": 1, "data": {"image": "/data/upload/3/0a1b2c3d-9.jpg"}, "annotations": [
            {"was_cancelled": True, "result": regions}, {"result": regions}
        ]},
        {"id": 2, "data": {"photo": "/data/local-files/?d=set/images/train/1.jpg"}, "annotations": [
            {"result": [region("rectanglelabels", square)]}
        ]},
        {"id": 3, "data": {"text": "no image"}, "annotations": []},
        {"id": 4, "data": {"image": "s3://bucket/train/2.jpg"}, "annotations": []},
    ]  # fmt: skip
    (images / "9.jpg").write_bytes(jpeg(60, 40, 9))
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    (first, second), printed = imported(sdd, tmp_path / "tasks.json", images, tmp_path / "out")
    assert entities(first) == [
        ("bird", (20.0, 5.0, 30.0, 10.0)),
        ("bus", (0.0, 0.0, 30.0, 20.0)),
        ("cat", (20.0, 20.0, 30.0, 35.0)),
        ("dog", (30.0, 20.0, 45.0, 30.0)),
    ]
    masks = {e.tag: e.mask.array() for e in first.entities if e.mask}
    np.testing.assert_array_equal(masks["bird"], mask)
    assert entities(second) == [("dog", (30.0, 20.0, 45.0, 30.0))]
    assert "3 × region that cannot be read" in printed
    assert "1 × region of a kind without area or name (choices)" in printed
    assert "1 × task without an image; first: task 3" in printed


def minimal(region: dict[str, Any]) -> dict[str, Any]:
    """A region as JSON-MIN has it."""
    return {**region["value"], **{key: region[key] for key in ("original_width", "original_height")}}


def test_label_studio_regions_in_json_min_are_read(sdd, images, tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:10, 20:30] = 1
    square = {"x": 50, "y": 50, "width": 25, "height": 25, "rotation": 0}
    boxes = [minimal(region("rectanglelabels", square)), minimal(region("rectanglelabels", {"x": 1}))]
    drawn = [
        minimal(region("polygonlabels", {"points": [[0, 0], [50, 0], [50, 50], [0, 50]]}, "bus")),
        minimal(region("brushlabels", {"format": "rle", "rle": brush(mask)}, "bird")),
        {"x": 10, "y": 10, "width": 1, "keypointlabels": ["eye"]},
    ]
    about = {"annotator": 1, "created_at": "2024-01-01T00:00:00Z", "lead_time": 1.5}
    records = [
        {"image": "/data/upload/3/0a1b2c3d-9.jpg", "id": 1, "bbox": boxes[1:], "annotation_id": 7, **about},
        {"image": "/data/upload/3/0a1b2c3d-9.jpg", "id": 1, "bbox": boxes, "parts": drawn, "annotation_id": 8, **about},
        {"image": "/data/upload/3/train/1.jpg", "id": 2, "choice": "indoors", "annotation_id": 9, **about},
    ]
    (images / "9.jpg").write_bytes(jpeg(60, 40, 9))
    (tmp_path / "tasks.json").write_text(json.dumps(records))
    (sample,), printed = imported(sdd, tmp_path / "tasks.json", images, tmp_path / "out")
    assert entities(sample) == [
        ("bird", (20.0, 5.0, 30.0, 10.0)), ("bus", (0.0, 0.0, 30.0, 20.0)), ("dog", (30.0, 20.0, 45.0, 30.0))
    ]  # fmt: skip
    masks = {e.tag: e.mask.array() for e in sample.entities if e.mask}
    np.testing.assert_array_equal(masks["bird"], mask)
    assert "1 × region that cannot be read" in printed
    assert "1 × region of a kind without area or name (None)" in printed


def test_other_lists_than_label_studios_are_one_line(refused, images, tmp_path):
    for tree, said in (([], "no task in it"), ([{"image": "0.jpg"}], "not Label Studio's"), ([1], "record 1")):
        (tmp_path / "tasks.json").write_text(json.dumps(tree))
        assert said in refused("import", tmp_path / "tasks.json", "--images", images, "--out", tmp_path / "out")
    (tmp_path / "tasks.json").write_text('[{"id": 1, "data": {"image": "train/0.jpg"}')
    assert "not valid JSON" in refused("import", tmp_path / "tasks.json", "--images", images, "--out", tmp_path / "out")


def test_labels_of_a_photo_that_was_turned_are_compared_with_the_upright_one(sdd, images, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 40), "teal").save(images / "train/0.jpg", exif=turned)
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/classes.txt").write_text("dog\n")
    (tmp_path / "labels/train/0.txt").write_text("0 0.5 0.25 1 0.5\n")
    (sample,), _ = imported(sdd, tmp_path / "labels", images, tmp_path / "out")
    assert (sample.width, sample.height) == (40, 60)
    assert entities(sample) == [("dog", (0.0, 0.0, 40.0, 30.0))]
