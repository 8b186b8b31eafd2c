"""An input that cannot be read is refused in one line; a row that cannot be read is a failed row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import fsspec.implementations.local
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datapipe.schema import Reason
from tests.sources.inputs import (
    LAION,
    image_folder,
    img2dataset_members,
    opened,
    records,
    refusal,
    whole,
    write_delimited,
    write_parquet,
    write_tar,
)


def _file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _table_without_rows(folder: Path) -> Path:
    pq.write_table(pa.table({"url": pa.array([], pa.string())}), folder / "t.parquet")
    return folder / "t.parquet"


def _mixed(folder: Path) -> Path:
    inside = folder / "mixed"
    inside.mkdir()
    write_parquet(inside / "a.parquet", records(2))
    write_delimited(inside / "b.csv", records(2))
    return inside


def _images_and_table(folder: Path) -> Path:
    inside = image_folder(folder / "both")
    write_parquet(inside / "a.parquet", records(2))
    return inside


def _empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _truncated_tar(folder: Path) -> Path:
    path = write_tar(folder / "t.tar", img2dataset_members(5))
    path.write_bytes(path.read_bytes()[:3000])
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "nothing.parquet", "no such file or folder"),
        (lambda folder: Path(f"{folder}/*.parquet"), "no file matches"),
        (_table_without_rows, "holds no rows"),
        (_file("t.csv", b"url,caption\n"), "holds no rows"),
        (_file("t.csv", b""), "holds no rows"),
        (_file("t.jsonl", b"\n"), "holds no rows"),
        (_file("t.json", b"[]"), "holds no rows"),
        (_file("t.parquet", b"these are no columns"), "not a parquet file"),
        (_file("t.parquet", b""), "not a parquet file"),
        (_file("t.csv", b"a,b\n1,2\n"), "no url column among a, b"),
        (_file("t.csv", b"caption,img_link\nx,y\n"), "set source.url_column=img_link if that is it"),
        (_file("t.csv", b"url,caption\nhttp://x,\xff\xfe\n"), "set source.encoding"),
        (_file("t.csv", b"url,url\nhttp://x,a\n"), "there twice"),
        (_file("t.jsonl", b'{"url": "\xff"}\n'), "not UTF-8"),
        (_file("t.json", b'{"url": {"0": "http://x"}}'), "orient='records'"),
        (_file("t.tar", b""), "not a whole tar"),
        (_file("t.tar", b"this is no tar" * 100), "not a whole tar"),
        (lambda folder: write_tar(folder / "t.tar", []), "holds no rows"),
        (lambda folder: write_tar(folder / "t.tar", [("1.json", b'{"url": "http://x"}')]), "no images in the tars"),
        (_empty_folder, "check the path"),
        (lambda folder: _file("walk.mp4", b"")(folder).parent, "for frames of its videos, set source.kind=video"),
        (_mixed, "holds csv and parquet"),
        (_images_and_table, "holds tables and images"),
        (_file("t.jpg", b"x"), "name the folder"),
        (_file("t.xlsx", b"x"), "neither a table"),
        (lambda folder: "", "no input is named"),
        (lambda folder: "nosuch://bucket/t.parquet", "Protocol not known"),
    ],
)
def test_an_unusable_input_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    assert says in refusal(make(tmp_path), tmp_path / "scratch")


@pytest.mark.parametrize(
    ("make", "good", "says"),
    [
        (_file("t.csv", b"url,caption\nhttp://x,a\nhttp://x,a,b,c\n"), 1, "t.csv line 3: 4 cells in place of 2"),
        (_file("t.jsonl", b'{"url": "x"}\n{"url": nonsense}\n'), 1, "row 1 is not valid JSON"),
        (_file("t.jsonl", b'{"url": "x"}\n["x"]7\n'), 1, "row 1 is str and no object"),
        (_truncated_tar, 1, "not a whole tar"),
    ],
)
def test_what_cannot_be_read_is_a_failed_row_or_refused_when_strict(
    tmp_path: Path, make: Callable[[Path], Path], good: int, says: str
) -> None:
    path = make(tmp_path)
    source = opened(path, tmp_path / "scratch")
    *read, lost = whole(source)
    assert len(read) == good and all(s.verdict is None for s in read)
    assert lost.verdict is not None and lost.verdict.reason is Reason.UNREADABLE and says in lost.verdict.detail
    assert says in "\n".join(source.described())
    assert says in refusal(path, tmp_path / "scratch", strict=True)
    assert says in refusal(path, tmp_path / "new", strict=True)


def test_the_nearest_names_are_offered(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "laion.parquet", [LAION])
    assert "did you mean laion.parquet?" in refusal(tmp_path / "laino.parquet", tmp_path)
    assert "did you mean punsafe?" in refusal(path, tmp_path, url_column="punsave")


def test_a_kind_that_the_input_is_not_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", records(2))
    assert "no .tar in it" in refusal(path, tmp_path, kind="img2dataset")
    assert "name a folder" in refusal(path, tmp_path, kind="folder")
    assert "no table in it" in refusal(image_folder(tmp_path / "in"), tmp_path, kind="table")


def test_an_input_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "t.parquet", records(2))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # The tests may run as root, who may read everything.
    monkeypatch.setattr(fsspec.implementations.local, "LocalFileOpener", denied)
    assert "permission denied" in refusal(path, tmp_path)
