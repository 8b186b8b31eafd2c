"""What is held while an input is read does not grow with the input."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from datapipe.formats.coco import read_coco
from datapipe.formats.label_studio import read_label_studio
from datapipe.formats.labels import Faults
from datapipe.sources import SourceSettings, json_stream, scanning
from datapipe.sources.folders import image_files
from datapipe.sources.input_files import InputFile, list_files
from datapipe.sources.json_tables import read_json
from datapipe.sources.row_index import Found
from datapipe.sources.tars import rows_of_tars
from tests.sources.inputs import img2dataset_members, write_tar

Read = Callable[[Path, int], Iterable[object]]
"""Writes an input of so many records into a folder, and returns what reads it."""


def tar(folder: Path, count: int) -> Iterable[object]:
    path = write_tar(folder / "a.tar", img2dataset_members(count))
    file = InputFile(str(path), path.name, path.stat().st_size, "")
    return rows_of_tars([file], {}, SourceSettings(), Found())


def folder_of_images(folder: Path, count: int) -> Iterable[object]:
    for number in range(count):
        (folder / f"{number:09}.jpg").touch()
        (folder / f"{number:09}.txt").touch()
    return image_files(str(folder))


def folder_beside_tables(folder: Path, count: int) -> Iterable[object]:
    for number in range(count):
        (folder / f"{number:09}.jpg").touch()
        (folder / f"{number:09}.json").touch()
    return (list_files(str(path)) for path in [folder])


def coco_captions(folder: Path, count: int) -> Iterable[object]:
    images = [{"id": n, "file_name": f"{n}.jpg", "coco_url": f"http://x/{n}.jpg"} for n in range(count)]
    told = [{"image_id": n, "caption": f"{n} sheep in a meadow"} for n in range(count)]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": told}))
    file = InputFile(str(path), path.name, path.stat().st_size, "")
    return read_json(path.open("rb"), file, SourceSettings(), Found())


def coco(folder: Path, count: int) -> Iterable[object]:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 60, "height": 40} for n in range(count)]
    square = [[10, 10, 30, 10, 30, 20, 10, 20]]
    objects = [
        {"image_id": n, "category_id": 1, "bbox": [10, 10, 20, 10], "segmentation": square} for n in range(count)
    ]
    path = folder / "instances.json"
    path.write_text(
        json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "dog"}]}),
    )
    return read_coco(path, folder, Faults())


def label_studio(folder: Path, count: int) -> Iterable[object]:
    value = {"x": 10, "y": 10, "width": 20, "height": 10, "rectanglelabels": ["dog"]}
    region = {"type": "rectanglelabels", "value": value, "original_width": 60, "original_height": 40}
    tasks = [{"id": n, "data": {"image": f"{n}.jpg"}, "annotations": [{"result": [region]}]} for n in range(count)]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return read_label_studio(folder / "tasks.json", folder, Faults())


@pytest.mark.parametrize("write", [tar, folder_of_images, folder_beside_tables, coco_captions, coco, label_studio])
def test_a_record_that_was_read_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Read) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 4096)
    monkeypatch.setattr(scanning, "QUIET_S", math.inf)

    def peak(name: str, count: int) -> int:
        (tmp_path / name).mkdir()
        rows = write(tmp_path / name, count)
        tracemalloc.start()
        assert sum(1 for _ in rows)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak("warm", 20)  # caches of regular expressions and the like
    # Tuples that Python keeps to use them again take up to 100 KB.
    assert peak("large", 3000) - peak("small", 300) < 2700 * 60
