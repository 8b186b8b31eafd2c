"""Rows that img2dataset could not download are rows all the same, in whatever format it wrote the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datapipe.sources import InputRows
from tests.sources.inputs import img2dataset_members, opened, tfrecord_of, whole, write_parquet, write_tar

SIDECAR: list[dict[str, Any]] = [
    {"key": "0", "url": "http://x/0", "caption": "row 0", "status": "success", "error_message": None},
    {"key": "7", "url": "http://x/7", "caption": "row 7", "status": "failed_to_download", "error_message": "404"},
]


def verdicts(source: InputRows) -> list[tuple[str, str, str]]:
    """(URL, text, detail) of the rows that failed."""
    return [(s.url, s.alt_text, s.verdict.detail) for s in whole(source) if s.verdict is not None]


def output(folder: Path, records: list[dict[str, Any]] = SIDECAR) -> Path:
    folder.mkdir()
    write_tar(folder / "00000.tar", img2dataset_members(2))
    write_parquet(folder / "00000.parquet", records)
    (folder / "00000_stats.json").write_text("{}")
    return folder


@pytest.mark.parametrize("named", ["", "00000.tar", "*.tar"])
def test_tars_have_them_from_the_parquet_beside(tmp_path: Path, named: str) -> None:
    source = opened(f"{output(tmp_path / 'in')}/{named}", tmp_path / "scratch", strict=True)
    assert source.rows == 3
    assert verdicts(source) == [("http://x/7", "row 7", "img2dataset: failed_to_download 404")]
    assert source.described()[0].endswith("3 rows: 1 tar; 1 that img2dataset could not download will fail")
    assert not source.described()[1:], "img2dataset's own files are not said to be left out"


def test_so_have_tfrecords(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    record = tfrecord_of(jpg=b"image", url=b"http://x/0")
    (tmp_path / "in" / "00000.tfrecord").write_bytes(record)
    write_parquet(tmp_path / "in" / "00000.parquet", SIDECAR)
    source = opened(tmp_path / "in", tmp_path / "scratch")
    assert whole(source)[0].image == b"image"
    assert verdicts(source) == [("http://x/7", "row 7", "img2dataset: failed_to_download 404")]


def test_a_first_tar_of_failures_only_does_not_end_the_run(tmp_path: Path) -> None:
    folder = output(tmp_path / "in", SIDECAR[1:] * 200)
    write_tar(folder / "00000.tar", [("none.txt", b"")])
    write_tar(folder / "00001.tar", img2dataset_members(2))
    assert [s.image for s in whole(opened(folder, tmp_path / "scratch"))][-2:] == [b"image 0", b"image 1"]


def test_a_parquet_that_is_another_tools_or_damaged_costs_no_image(tmp_path: Path) -> None:
    folder = output(tmp_path / "in", [{"key": "0", "caption": "a"}])
    assert opened(folder, tmp_path / "scratch").rows == 2
    (folder / "00000.parquet").write_bytes(b"none")
    source = opened(folder, tmp_path / "scratch")
    assert source.rows == 2
    assert "00000.parquet: " in source.described()[1]
    assert "not counted" in source.described()[1]


def test_tables_and_images_beside_tars_are_said_to_be_left_out(tmp_path: Path) -> None:
    folder = output(tmp_path / "in")
    (folder / "more.csv").write_text("url\n")
    (folder / "logo.png").write_bytes(b"")
    assert "note: 1 table and 1 image beside the tars left out" in opened(folder, tmp_path / "scratch").described()
