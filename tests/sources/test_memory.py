"""What is held while an input is read does not grow with the input."""

from __future__ import annotations

import importlib
import json
import math
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry

from datapipe.formats import digest_of, read_labels
from datapipe.formats import openimages as openimages_tables
from datapipe.formats.coco import read_coco
from datapipe.formats.cvat import read_cvat
from datapipe.formats.label_studio import read_label_studio
from datapipe.formats.labels import Faults
from datapipe.formats.openimages import read_openimages
from datapipe.sources import SourceSettings, json_stream, json_tables, scanning, store_listing
from datapipe.sources.arrow_tables import read_arrow
from datapipe.sources.delimited import read_delimited
from datapipe.sources.folders import image_files
from datapipe.sources.input_files import InputFile
from datapipe.sources.input_rows import no_sidecar
from datapipe.sources.json_tables import read_json
from datapipe.sources.kinds import PARQUET, recognize_kind
from datapipe.sources.listing import list_files
from datapipe.sources.parquet_tables import Table, read_parquet
from datapipe.sources.row_index import Found
from datapipe.sources.tars import rows_of_tars
from datapipe.sources.tfrecords import read_tfrecords
from tests.sources.buckets import listing_server
from tests.sources.inputs import img2dataset_members, tfrecord_of, write_tar

Read = Callable[[Path, int], Iterable[object]]
"""Writes an input of so many records into a folder, and returns what reads it."""


def tar(folder: Path, count: int) -> Iterable[object]:
    path = write_tar(folder / "a.tar", img2dataset_members(count))
    file = InputFile(str(path), path.name, path.stat().st_size, "")
    return rows_of_tars([file], no_sidecar, SourceSettings(), Found())


def folder_of_images(folder: Path, count: int) -> Iterable[object]:
    for number in range(count):
        (folder / f"{number:09}.jpg").touch()
        (folder / f"{number:09}.txt").touch()
    return image_files(str(folder))


def folder_beside_tables(folder: Path, count: int) -> Iterable[object]:
    for number in range(count):
        (folder / f"{number:09}.jpg").touch()
        (folder / f"{number:09}.json").touch()
    with list_files(str(folder)) as listing:
        yield listing


def folder_of_tars(folder: Path, count: int) -> Iterable[object]:
    for number in range(count):
        (folder / f"{number:09}.tar").touch()
        (folder / f"{number:09}.parquet").touch()
    with list_files(str(folder)) as listing:
        recognized = recognize_kind(listing, "auto")
        sidecar_of = listing.beside(recognized.files, PARQUET)
        yield from (sidecar_of(file.name) for file in recognized.files)


def s3_images(folder: Path, count: int) -> Iterable[object]:
    return image_files(f"s3://bucket/{2 * count}")


def gcs_images(folder: Path, count: int) -> Iterable[object]:
    return image_files(f"gs://bucket/{2 * count}")


NAMES, ROW = ("url", "caption"), ("http://x/{n}.jpg", "{n} sheep" + " in a meadow" * 350)
"""So long that 300 rows fill the megabyte by which a table is recognized."""


def csv(folder: Path, count: int) -> Iterable[object]:
    lines = (",".join(ROW).format(n=n) + "\n" for n in range(count))
    (folder / "a.csv").write_text("url,caption\n" + "".join(lines))
    return read_delimited((folder / "a.csv").open("rb"), file_of(folder / "a.csv"), SourceSettings(), Found())


def json_lines(folder: Path, count: int) -> Iterable[object]:
    rows = (json.dumps({"url": ROW[0].format(n=n), "caption": ROW[1].format(n=n)}) + "\n" for n in range(count))
    (folder / "a.jsonl").write_text("".join(rows))
    return read_json((folder / "a.jsonl").open("rb"), file_of(folder / "a.jsonl"), SourceSettings(), Found())


def arrow(folder: Path, count: int) -> Iterable[object]:
    """In record batches of 100 rows."""
    path = folder / "a.arrow"
    table = pa.table({name: [text.format(n=n) for n in range(count)] for name, text in zip(NAMES, ROW, strict=True)})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return read_arrow(path.open("rb"), file_of(path), SourceSettings(), Found())


def parquet(folder: Path, count: int) -> Iterable[object]:
    """In row groups of 100 rows."""
    path = folder / "a.parquet"
    table = pa.table({name: [text.format(n=n) for n in range(count)] for name, text in zip(NAMES, ROW, strict=True)})
    pq.write_table(table, path, row_group_size=100)
    return read_parquet(Table(str(path), count), str(path), 0, count, SourceSettings())


def tfrecord(folder: Path, count: int) -> Iterable[object]:
    path = folder / "a.tfrecord"
    path.write_bytes(
        b"".join(tfrecord_of(url=ROW[0].format(n=n).encode(), caption=b"sheep" * 19) for n in range(count))
    )
    return read_tfrecords(path.open("rb"), file_of(path), SourceSettings(), Found())


def file_of(path: Path) -> InputFile:
    return InputFile(str(path), path.name, path.stat().st_size, "")


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


def label_files(folder: Path, suffix: str, text: str, count: int) -> Iterable[object]:
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").touch()
    for number in range(count):
        (folder / f"{number:09}{suffix}").write_text(text)
    (folder / "classes.txt").write_text("dog")
    with read_labels(folder, folder / "images", Faults()) as (rows, files):
        yield digest_of(files)
        yield from rows


def yolo(folder: Path, count: int) -> Iterable[object]:
    return label_files(folder, ".txt", "0 0.5 0.5 0.2 0.2", count)


def voc(folder: Path, count: int) -> Iterable[object]:
    size = "<size><width>60</width><height>40</height></size>"
    return label_files(folder, ".xml", f"<annotation><filename>a.jpg</filename>{size}</annotation>", count)


def json_min(folder: Path, count: int) -> Iterable[object]:
    """Every record an annotation of one task."""
    record = {"id": 1, "annotation_id": 1, "image": "a.jpg", "label": []}
    (folder / "tasks.json").write_text(json.dumps([record] * count))
    return read_label_studio(folder / "tasks.json", folder, Faults())


def cvat(folder: Path, count: int) -> Iterable[object]:
    shape = '<box label="dog" xtl="1" ytl="1" xbr="9" ybr="9"/>'
    images = (f'<image name="{n}.jpg" width="60" height="40">{shape}</image>' for n in range(count))
    (folder / "annotations.xml").write_text(f"<annotations>{''.join(images)}</annotations>")
    return read_cvat(folder / "annotations.xml", folder, Faults())


def openimages(folder: Path, count: int) -> Iterable[object]:
    (folder / "classes.csv").write_text("/m/dog,Dog\n")
    corners = ("XMin", "XMax", "YMin", "YMax")
    box, mask = (",".join(["ImageID,LabelName", *more]) for more in (corners, [f"Box{c}" for c in corners]))
    boxes = (f"{n:09},/m/dog,0.1,0.5,0.1,0.5,0,0\n" for n in range(count))
    masks = (f"{n:09},/m/dog,0.1,0.5,0.1,0.5,{n}.png\n" for n in range(count))
    (folder / "boxes.csv").write_text(f"{box},IsGroupOf,IsDepiction\n{''.join(boxes)}")
    (folder / "masks.csv").write_text(f"{mask},MaskPath\n{''.join(masks)}")
    for number in range(count):
        (folder / f"{number}.png").touch()
        (folder / f"{number:09}.jpg").touch()
    return read_openimages(folder / "boxes.csv", folder / "classes.csv", folder, Faults(), folder / "masks.csv")


INPUTS = [tar, folder_of_images, folder_beside_tables, folder_of_tars, coco_captions]
TABLES = [csv, json_lines, arrow, parquet, tfrecord]
BUCKETS = [s3_images, gcs_images]
LABELS = [coco, label_studio, json_min, yolo, voc, cvat, openimages]


@pytest.fixture
def bucket_of_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with listing_server() as address:
        for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
            monkeypatch.setenv(name, address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        # Else gcsfs asks by gRPC which kind of bucket it is, which an emulator does not know.
        monkeypatch.setitem(_registry, "gs", importlib.import_module("gcsfs.core").GCSFileSystem)
        for protocol in ("s3", "gs"):  # instances are kept, with the address that they had
            fsspec.get_filesystem_class(protocol).clear_instance_cache()
        yield
        for protocol in ("s3", "gs"):
            fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.mark.parametrize("write", [*INPUTS, *TABLES, *BUCKETS, *LABELS])
@pytest.mark.usefixtures("bucket_of_images")
def test_a_record_that_was_read_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Read) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 4096)
    monkeypatch.setattr(json_tables, "KEYS_FROM", 20)
    monkeypatch.setattr(openimages_tables, "ROWS_AT_ONCE", 100)
    monkeypatch.setattr(scanning, "QUIET_S", math.inf)
    monkeypatch.setattr(store_listing, "PAGE", 250)
    # Else the table of the strings that pathlib interns may have to grow, by megabytes, while this is measured.
    interned = [sys.intern(f"interned {number}") for number in range(200_000)]

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
    del interned


@pytest.mark.usefixtures("bucket_of_images")
@pytest.mark.parametrize("store", ["s3", "gs"])
def test_a_bucket_is_listed_over_many_pages(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    monkeypatch.setattr(store_listing, "PAGE", 7)
    found = list(image_files(f"{store}://bucket/24"))
    assert [image.name for image in found] == [b"%09d.jpg" % n for n in range(12)]
    assert all(image.texts == (image.name.replace(b"jpg", b"txt"),) for image in found)
    with list_files(f"{store}://bucket/24/*.jpg") as listing:
        assert listing.images == 12
