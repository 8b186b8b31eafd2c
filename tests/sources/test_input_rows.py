from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.local
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.schema import Reason
from datapipe.sources import InputRows, SourceSettings, json_stream, open_source, parquet_tables, scanning
from datapipe.sources.folders import decoded_text
from subject_diffusion.errors import SourceError
from tests.conftest import jpeg
from tests.sources.inputs import (
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

LAION = {
    "SAMPLE_ID": 7,
    "URL": "http://a.example/0.jpg",
    "TEXT": "a dog",
    "HEIGHT": 10,
    "WIDTH": 20,
    "LICENSE": "CC-BY",
    "similarity": 0.31,
    "punsafe": 0.01,
    "pwatermark": 0.2,
    "AESTHETIC_SCORE": 6.5,
    "hash": 123,
}
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
        (_empty_folder, "no images in this folder"),
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


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 that lives in this process's moto server."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in [
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ]:
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3").create_bucket(Bucket="bucket")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield "s3://bucket"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def test_inputs_and_their_index_can_live_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    fs = fsspec.filesystem("s3")
    fs.put_file(str(write_parquet(tmp_path / "t.parquet", records(20))), f"{bucket}/tables/t.parquet")
    fs.put_file(str(write_tar(tmp_path / "0.tar", img2dataset_members(5))), f"{bucket}/tars/0.tar")
    for name in ["1.jpg", "b/2.png"]:
        fs.pipe_file(f"{bucket}/images/{name}", name.encode())
    fs.pipe_file(f"{bucket}/images/1.txt", b"the first")

    assert whole(opened(f"{bucket}/tables", tmp_path)) == expected(20)
    assert whole(opened(f"{bucket}/tables/*.parquet", tmp_path)) == expected(20)
    tars = open_source(SourceSettings(path=f"{bucket}/tars"), f"{bucket}/out")
    assert [s.image for s in tars.read(1, 4)] == [b"image 1", b"image 2", b"image 3"]
    images = open_source(SourceSettings(path=f"{bucket}/images"), f"{bucket}/out")
    assert [(s.url, s.image, s.alt_text) for s in whole(images)] == [
        ("1.jpg", b"1.jpg", "the first"),
        ("b/2.png", b"b/2.png", ""),
    ]
    assert "no such file or folder" in refusal(f"{bucket}/nothing.parquet", tmp_path)


@pytest.mark.parametrize("column", ["url", "image_path"])
def test_a_table_may_name_images_in_a_bucket(tmp_path: Path, bucket: str, column: str) -> None:
    fsspec.filesystem("s3").pipe_file(f"{bucket}/my images/0.jpg", b"0")
    names = [f"{bucket}/my images/0.jpg", f"{bucket}/none.jpg", "http://a.example/2.jpg"]
    path = write_delimited(tmp_path / "t.csv", [{column: name, "caption": "a"} for name in names])
    there, missing, web = whole(opened(path, tmp_path / "scratch"))
    assert [s.url for s in (there, missing, web)] == names
    assert (there.image, web.image, web.verdict) == (b"0", None, None)
    assert missing.verdict is not None and missing.verdict.retryable
    assert missing.verdict.detail == f"{bucket}/none.jpg: FileNotFoundError"
    write_delimited(tmp_path / "t.csv", [{column: f"{bucket}/none.jpg", "caption": "a"}])
    assert "check the bucket" in refusal(path, tmp_path / "scratch")


def test_a_bucket_without_credentials_says_which_variables_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from botocore.exceptions import NoCredentialsError

    def without(*_: object, **__: object) -> None:
        raise NoCredentialsError

    monkeypatch.setattr(fsspec, "url_to_fs", without)
    assert "AWS_ACCESS_KEY_ID" in refusal("s3://bucket/t.parquet", tmp_path)


def a_users_folder(root: Path) -> Path:
    """What cameras, file servers, browsers and notebooks leave in a folder of photographs."""
    photo = jpeg(seed=1)
    for name in (
        "x.jpeg", "y.jfif", "x.avif", "z.HEIC", "UPPER.JPG", "z.jpg.jpg", "sp ace#%20.jpg", "café ☕.jpg", "pair.jpg",
        "nosuffix", "q.jpg?w=200", "bom.jpg", "wide.jpg", "latin.jpg", "tags.jpg", "j.jpg", "a/b/deep.jpg",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(photo)
    for name in (
        "._x.jpg", ".hidden.jpg", ".thumbnails/t.jpg", ".ipynb_checkpoints/x-checkpoint.jpg", "@eaDir/x.jpg/SMALL.jpg",
        "__MACOSX/._x.jpg", "$RECYCLE.BIN/x.jpg", "a/@eaDir/y.jpg",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(photo)
    for name in ("Thumbs.db", ".DS_Store", "README", "Makefile", "notes.md", "clip.mp4"):
        (root / name).write_bytes(b"no image")
    (root / "UPPER.TXT").write_text("upper case")
    (root / "nosuffix.txt").write_text("no ending")
    (root / "bom.txt").write_bytes(b"\xef\xbb\xbfwith bom\r\n")
    (root / "wide.txt").write_text("wide", encoding="utf-16")
    (root / "latin.txt").write_bytes("café – crème".encode("cp1252"))
    (root / "tags.caption").write_text("a caption")
    (root / "j.json").write_text('\ufeff{"caption": "from json", "url": "http://x.example/j.jpg", "punsafe": 0.5}')
    return root


TEXTS_OF_A_USERS_FOLDER = {
    "UPPER.JPG": "upper case",
    "a/b/deep.jpg": "",
    "bom.jpg": "with bom",
    "café ☕.jpg": "",
    "http://x.example/j.jpg": "from json",
    "latin.jpg": "café – crème",
    "nosuffix": "no ending",
    "pair.jpg": "",
    "q.jpg?w=200": "",
    "sp ace#%20.jpg": "",
    "tags.jpg": "a caption",
    "wide.jpg": "wide",
    "x.avif": "",
    "x.jpeg": "",
    "y.jfif": "",
    "z.HEIC": "",
    "z.jpg.jpg": "",
}


def test_of_a_users_folder_the_photographs_are_read_and_nothing_else(tmp_path: Path) -> None:
    samples = whole(opened(a_users_folder(tmp_path / "in"), tmp_path / "scratch", kind="folder"))
    assert {s.url: s.alt_text for s in samples} == TEXTS_OF_A_USERS_FOLDER
    assert len(samples) == len(TEXTS_OF_A_USERS_FOLDER), "each once"
    assert {s.image for s in samples} == {jpeg(seed=1)}
    assert [s.scores for s in samples if s.url.endswith("j.jpg") and "//" in s.url] == [(("punsafe", 0.5),)]


def test_in_a_bucket_a_users_folder_is_read_alike(tmp_path: Path, bucket: str) -> None:
    fs, inner = fsspec.core.url_to_fs(f"{bucket}/photos")
    fs.put(str(a_users_folder(tmp_path / "in")), inner, recursive=True)
    samples = whole(opened(f"{bucket}/photos", tmp_path / "scratch", kind="folder"))
    assert {s.url: s.alt_text for s in samples} == TEXTS_OF_A_USERS_FOLDER


def test_a_changed_caption_beside_an_image_makes_another_input(tmp_path: Path) -> None:
    folder = a_users_folder(tmp_path / "in")
    before = opened(folder, tmp_path / "scratch", kind="folder")
    (folder / "tags.caption").write_text("another caption")
    after = opened(folder, tmp_path / "scratch", kind="folder")
    assert after.fingerprint != before.fingerprint
    assert "another caption" in [s.alt_text for s in whole(after)]


@given(st.text(max_size=30), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_a_caption_in_unicode_comes_back_as_it_was(text: str, encoding: str) -> None:
    text = text.removeprefix("\ufeff")
    content = text.encode(encoding, "replace")
    assert decoded_text(content) == content.decode(encoding)


def test_a_long_scan_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_delimited(tmp_path / "t.csv", records(20))
    opened(path, tmp_path / "quick")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(scanning, "QUIET_S", 0.0)
    monkeypatch.setattr(scanning, "PLAIN_S", 0.0)
    opened(path, tmp_path / "long")
    assert "input: 20 rows read, " in capsys.readouterr().err
