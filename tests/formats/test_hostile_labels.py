"""Labels from strangers: what would take all memory, or end the process, costs itself or the file, in one line."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datapipe.schema import Outcome
from datapipe.shards import Store, manifests
from tests.conftest import Sdd, jpeg

SIDE = 2**30
ROOM = 1 << 30
"""Bytes that a case may take beyond what the tests have."""


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What asks for more than a gigabyte fails, in place of this machine."""
    if not Path("/proc/self/statm").exists():  # not Linux
        yield
        return
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def coco(folder: Path, size: int, **changes: Any) -> Path:
    annotation = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], **changes}
    image = {"id": 1, "file_name": "0.jpg", "width": size, "height": size}
    tree = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "dog"}]}
    (folder / "a.json").write_text(json.dumps(tree))
    return folder / "a.json"


def cvat(folder: Path, shape: str) -> Path:
    image = f'<image name="0.jpg" width="{SIDE}" height="{SIDE}">{shape}</image>'
    (folder / "a.xml").write_text(f"<annotations>{image}</annotations>")
    return folder / "a.xml"


def voc(folder: Path, text: str) -> Path:
    (folder / "labels").mkdir()
    (folder / "labels" / "0.xml").write_text(text)
    return folder / "labels"


def yolo(folder: Path, names: str) -> Path:
    (folder / "labels").mkdir()
    (folder / "labels" / "0.txt").write_text("0 0.5 0.5 0.5 0.5")
    (folder / "labels" / "data.yaml").write_text(names)
    return folder / "labels"


SQUARE = [[0, 0, SIDE, 0, SIDE, SIDE, 0, SIDE]]
NAMES_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(9)
)
XML_BOMB = (
    '<!DOCTYPE a [<!ENTITY a "xxxxxxxxxx">'
    + "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(12))
    + "]><annotation><filename>&m;</filename></annotation>"
)
OUTSIDE_ENTITY = (
    '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><filename>&e;</filename></annotation>'
)

CASES: dict[str, Callable[[Path], Path]] = {
    "COCO: a polygon on 2^60 pixels": lambda f: coco(f, SIDE, segmentation=SQUARE),
    "COCO: run lengths of 2^60 pixels": lambda f: coco(
        f, SIDE, segmentation={"size": [SIDE, SIDE], "counts": [0, SIDE * SIDE]}
    ),
    "COCO: a packed mask that overruns": lambda f: coco(f, 48, segmentation={"size": [32, 48], "counts": "oooooo0"}),
    "COCO: a packed mask of 2^60 pixels": lambda f: coco(
        f, SIDE, segmentation={"size": [SIDE, SIDE], "counts": "oooooo0"}
    ),
    "COCO: a box of 10^400": lambda f: coco(f, 48, bbox=[1, 1, 10**400, 9]),
    "COCO: a category of half a character": lambda f: coco(f, 48, category_id="\ud83d"),
    "CVAT: a polygon on 2^60 pixels": lambda f: cvat(f, f'<polygon label="dog" points="0,0;{SIDE},0;{SIDE},{SIDE}"/>'),
    "CVAT: a mask on 2^60 pixels": lambda f: cvat(
        f, '<mask label="dog" left="0" top="0" width="2" height="2" rle="1,3"/>'
    ),
    "VOC: entities that grow": lambda f: voc(f, XML_BOMB),
    "VOC: an entity of this machine": lambda f: voc(f, OUTSIDE_ENTITY),
    "VOC: elements nested without end": lambda f: voc(f, "<a>" * 200_000),
    "VOC: a file above the folder": lambda f: voc(
        f, "<annotation><filename>../../../etc/passwd</filename></annotation>"
    ),
    "YOLO: names that grow": lambda f: yolo(f, f"{NAMES_BOMB}names: {{0: *j}}"),
    "YOLO: a name that runs code": lambda f: yolo(f, "names: !!python/object/apply:os.mkdir [run]"),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_labels_cost_themselves(sdd: Sdd, tmp_path: Path, case: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(jpeg(48, 32))
    labels = CASES[case](tmp_path)
    code, printed, error = sdd("import", labels, "--images", tmp_path / "images", "--out", tmp_path / "out")
    assert "Traceback" not in error
    assert "root:" not in printed + error
    if code == 2:
        assert error.startswith("sdd: ")
        assert error.count("\n") == 1
        return
    assert code == 0
    (manifest,) = manifests(Store(str(tmp_path / "out")), "shard")
    assert manifest.rows == sum(manifest.counts.values()) == 1
    assert "labels: " in printed or not manifest.counts.get(Outcome.KEPT.value)
