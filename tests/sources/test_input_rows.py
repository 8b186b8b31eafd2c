"""Tables, tars and folders give the same rows, however they are written, cut and read."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.schema import Reason
from datapipe.sources import InputRows, json_stream, parquet_tables
from subject_diffusion.errors import SourceError
from tests.sources.inputs import (
    LAION,
    expected,
    image_folder,
    img2dataset_members,
    opened,
    records,
    refusal,
    whole,
    write_delimited,
    write_json,
    write_jsonl,
    write_parquet,
    write_tar,
)

DATACOMP = {
    "uid": "u",
    "url": "http://a.example/0.jpg",
    "text": "a dog",
    "original_width": 1,
    "clip_b32_similarity_score": 0.31,
    "clip_l14_similarity_score": 0.2,
    "face_bboxes": "[]",
    "sha256": "ab",
}
COYO = {
    "id": 1,
    "url": "http://a.example/0.jpg",
    "text": "a dog",
    "width": 1,
    "height": 2,
    "image_phash": "ff",
    "clip_similarity_vitb32": 0.31,
    "clip_similarity_vitl14": 0.2,
    "watermark_score": 0.2,
    "aesthetic_score_laion_v2": 6.5,
}
OPENED = "http://a.example/0.jpg"


@pytest.mark.parametrize(
    ("record", "scores"),
    [
        (LAION, {"aesthetic": 6.5, "punsafe": 0.01, "pwatermark": 0.2, "similarity": 0.31}),
        (DATACOMP, {"similarity": 0.31}),
        (COYO, {"aesthetic": 6.5, "pwatermark": 0.2, "similarity": 0.31}),
    ],
    ids=["laion", "datacomp", "coyo"],
)
@pytest.mark.parametrize("write", [write_parquet, write_delimited, write_jsonl], ids=["t.parquet", "t.csv", "t.jsonl"])
def test_the_columns_of_known_tables_are_recognized(
    tmp_path: Path, record: dict[str, Any], scores: dict[str, float], write: Callable[..., Path]
) -> None:
    suffix = {write_parquet: "parquet", write_delimited: "csv", write_jsonl: "jsonl"}[write]
    (sample,) = whole(opened(write(tmp_path / f"t.{suffix}", [record]), tmp_path))
    assert (sample.row, sample.url, sample.alt_text) == (0, OPENED, "a dog")
    assert sample.scores == tuple(sorted(scores.items()))
    assert sample.licence == record.get("LICENSE", "")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl", "json"])
def test_every_format_of_a_table_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    write = {"parquet": write_parquet, "csv": write_delimited, "tsv": write_delimited, "jsonl": write_jsonl}
    source = opened(write.get(suffix, write_json)(tmp_path / f"t.{suffix}", records(50)), tmp_path / "scratch")
    assert source.rows == 50
    assert whole(source) == expected(50)


def test_a_folder_or_a_glob_of_tables_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, part in [("b", records(30)[20:]), ("a", records(30)[:20])]:
        write_parquet(folder / f"{name}.parquet", part)
    (folder / "_SUCCESS").touch()
    (folder / ".hidden.csv").touch()
    assert whole(opened(folder, tmp_path)) == expected(30)
    assert whole(opened(f"{folder}/*.parquet", tmp_path)) == expected(30)


@given(st.data())
def test_slices_of_any_partition_give_the_rows_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source = _partitioned(tmp_path_factory)
    cuts = sorted(data.draw(st.sets(st.integers(0, source.rows))) | {0, source.rows})
    slices = [range(a, b) for a, b in itertools.pairwise(cuts)]
    shuffled = data.draw(st.permutations(slices))
    read = {s.start: pickle.loads(pickle.dumps(source)).read(s.start, s.stop) for s in shuffled}  # noqa: S301 - our own
    assert [sample for start in sorted(read) for sample in read[start]] == expected(source.rows)


_SOURCES: dict[str, InputRows] = {}


def _partitioned(factory: pytest.TempPathFactory) -> InputRows:
    """Three parquet files of 41, 0 and 23 rows, in row groups of 10."""
    if "source" not in _SOURCES:
        folder = factory.mktemp("partitioned")
        schema = pa.Table.from_pylist(records(64)).schema
        for name, part in [("a", records(64)[:41]), ("b", []), ("c", records(64)[41:])]:
            pq.write_table(pa.Table.from_pylist(part, schema), folder / f"{name}.parquet", row_group_size=10)
        _SOURCES["source"] = opened(folder, folder)
    return _SOURCES["source"]


def test_a_row_group_too_large_to_keep_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_tables, "CACHED_GROUP_BYTES", 0)
    path = write_parquet(tmp_path / "t.parquet", records(25_000), row_group_size=25_000)
    source = opened(path, tmp_path)
    assert source.read(9_990, 20_010) == expected(25_000)[9_990:20_010]


def test_json_is_read_whole_however_it_is_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 7)
    assert whole(opened(write_json(tmp_path / "t.json", records(9)), tmp_path)) == expected(9)


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "t.parquet", [{"Link": "http://x/1", "caption": "no", "title": "yes", "rights": "CC0"}]
    )
    (sample,) = whole(opened(path, tmp_path, url_column="link", alt_text_column="title", licence_column="rights"))
    assert (sample.url, sample.alt_text, sample.licence) == ("http://x/1", "yes", "CC0")


def test_missing_and_odd_values_leave_a_row_and_no_error(tmp_path: Path) -> None:
    rows = [
        '{"url": null, "text": "\\ud800"}',
        '{"text": null, "punsafe": NaN}',
        '{"url": " http://x/1 ", "punsafe": "0.5", "similarity": 1' + "0" * 400 + "}",
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(rows))
    a, b, c = whole(opened(path, tmp_path))
    assert (a.url, a.alt_text) == ("", "?")
    assert (b.alt_text, b.scores) == ("", ())
    assert (c.url, c.scores) == ("http://x/1", (("punsafe", 0.5),))


def test_img2dataset_tars_bring_their_images(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    members = img2dataset_members(10)
    write_tar(folder / "00001.tar", members[12:])
    write_tar(folder / "00000.tar", members[:12])
    (folder / "00000_stats.json").write_text("{}")
    write_parquet(folder / "00000.parquet", records(4))
    source = opened(folder, tmp_path / "scratch")
    assert source.rows == 10
    samples = [*source.read(7, 10), *source.read(0, 7)]
    assert [s.row for s in samples] == [7, 8, 9, 0, 1, 2, 3, 4, 5, 6]
    for s in samples:
        i = s.row
        assert (s.image, s.url, s.alt_text) == (f"image {i}".encode(), f"http://x/{i}", f"row {i}")
        assert (s.licence, s.scores) == ("CC0", (("punsafe", 0.5),))


def test_a_tar_member_without_json_or_image_is_still_a_row(tmp_path: Path) -> None:
    members = [
        ("a/1.jpg", b"one"),
        ("a/1.json", b"[" * 100_000),
        ("a/1.txt", b"from txt"),
        ("a/2.json", b'{"url": "http://x/2"}'),
        ("b/2.png", b""),
    ]
    first, second, third = whole(opened(write_tar(tmp_path / "t.tar", members), tmp_path / "scratch"))
    assert (first.image, first.alt_text) == (b"one", "from txt")
    assert (second.image, second.url) == (None, "http://x/2")
    assert third.image == b""


def test_a_folder_of_images_is_read_in_order_with_its_texts(tmp_path: Path) -> None:
    samples = whole(opened(image_folder(tmp_path / "in"), tmp_path / "scratch"))
    assert [s.url for s in samples] == ["1.jpg", "b/2.png", "b-side.JPG", "ü.webp"]
    assert [s.image for s in samples] == [s.url.encode() for s in samples]
    assert [s.alt_text for s in samples] == ["the first", "", "", ""]


def test_links_out_of_the_folder_pipes_and_odd_names_are_safe(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "broken.jpg").symlink_to("nowhere.jpg")
    (folder / "inside.jpg").symlink_to("1.jpg")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jpg")).write_bytes(b"odd")
    samples = whole(opened(folder, tmp_path / "scratch"))
    assert [s.url for s in samples] == ["1.jpg", "b/2.png", "b-side.JPG", "inside.jpg", "ü.webp", "\ufffd.jpg"]
    assert samples[-1].image == b"odd"
    assert samples[3].image == b"1.jpg"


def test_an_image_that_has_gone_fails_its_row_alone(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in")
    source = opened(folder, tmp_path / "scratch")
    (folder / "1.jpg").unlink()
    (folder / "b" / "2.png").write_bytes(b"2")
    gone, shorter, *rest = whole(source)
    for sample in (gone, shorter):
        assert sample.verdict
        assert (sample.verdict.reason, sample.verdict.retryable) == (Reason.UNREADABLE, True)
    assert all(s.image for s in rest)


def test_the_fingerprint_follows_the_input(tmp_path: Path) -> None:
    a = opened(write_parquet(tmp_path / "t.parquet", records(5)), tmp_path).fingerprint
    os.utime(tmp_path / "t.parquet", (1, 1))
    assert opened(tmp_path / "t.parquet", tmp_path).fingerprint == a, "a small table is known by its content"
    b = opened(write_parquet(tmp_path / "t.parquet", records(6)), tmp_path).fingerprint
    assert a != b
    csv = opened(write_delimited(tmp_path / "t.csv", records(6)), tmp_path).fingerprint
    assert csv not in (a, b)


def test_an_index_is_made_once_and_anew_for_a_changed_input(tmp_path: Path) -> None:
    folder, scratch = image_folder(tmp_path / "in"), tmp_path / "scratch"
    first = opened(folder, scratch)
    assert opened(folder, scratch) == first
    assert len(list((scratch / "input").iterdir())) == 1
    (folder / "new.jpg").write_bytes(b"new")
    assert opened(folder, scratch).fingerprint != first.fingerprint
    assert opened(folder, scratch).rows == first.rows + 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_damaged_row_group_costs_its_own_rows_or_is_refused(tmp_path: Path, strict: bool) -> None:
    path = write_parquet(tmp_path / "t.parquet", records(300), compression="none", row_group_size=100)
    content = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(1)
    start = group.column(0).dictionary_page_offset or group.column(0).data_page_offset
    content[start : start + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    source = opened(path, tmp_path, strict=strict)
    if strict:
        with pytest.raises(SourceError, match=r"t\.parquet"):
            whole(source)
        return
    samples = whole(source)
    assert (samples[:100], samples[200:]) == (expected(300)[:100], expected(300)[200:])
    for sample in samples[100:200]:
        assert sample.verdict is not None and sample.verdict.reason is Reason.UNREADABLE
        assert sample.verdict.detail.startswith("t.parquet: damaged")


def test_a_failed_index_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"url": ')
    refusal(path, tmp_path / "scratch")
    assert list((tmp_path / "scratch" / "input").iterdir()) == []


def test_a_pickled_source_is_small(tmp_path: Path) -> None:
    source = opened(write_parquet(tmp_path / "t.parquet", records(2000)), tmp_path)
    source.read(0, 10)
    assert len(pickle.dumps(source)) < 1500


def test_rows_out_of_range_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    source = opened(write_parquet(tmp_path / "t.parquet", records(5)), tmp_path)
    assert source.read(5, 5) == []
    with pytest.raises(ValueError, match="rows 3 to 6 of 5"):
        source.read(3, 6)
