"""Folders as people have them, and the same inputs in a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import fsspec.implementations.local
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.sources import SourceSettings, open_source, scanning
from datapipe.sources.folders import decoded_text
from tests.conftest import jpeg
from tests.sources.inputs import (
    expected,
    img2dataset_members,
    opened,
    records,
    refusal,
    whole,
    write_delimited,
    write_parquet,
    write_tar,
)


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
