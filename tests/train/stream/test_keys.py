"""Tars of other people: which members are one sample, and which image is its own."""

from __future__ import annotations

import gzip
import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from datapipe.sources import SourceSettings, open_source
from subject_diffusion import Source, Stream
from subject_diffusion.errors import ShardError
from tests.sources.inputs import write_tar

Member = tuple[str, bytes]


def samples(path: Path, cache: Path, **options) -> list[tuple[str, dict[str, bytes]]]:
    """(key, members) of every sample that the stream gives, in order."""
    batches = Stream([Source(str(path), **options)], 1, mode="evaluate", cache=str(cache))
    return [
        (key, {name: bytes(data) for name, data in members.items()})
        for batch in batches
        for key, members in zip(batch["key"], batch["members"], strict=True)
    ]


def pipeline(path: Path, scratch: Path) -> list[tuple[bytes | None, str]]:
    """(image, text) of every row that the pipeline reads of the same tar."""
    rows = open_source(SourceSettings(path=str(path)), str(scratch))
    return [(sample.image, sample.alt_text) for sample in rows.read(0, rows.rows)]


DATED = [(f"IMG_2020.01.0{i}.{e}", f"{e}{i}".encode()) for i in range(3) for e in ("jpg", "txt")]


def test_keys_with_dots_are_told_apart_and_said_so(tmp_path):
    path = write_tar(tmp_path / "a.tar", DATED)
    with pytest.warns(UserWarning, match=r"a\.tar: keys end at the last dot .*key_rule='first_dot'"):
        found = samples(path, tmp_path / "cache")
    assert found == [(f"IMG_2020.01.0{i}", {"jpg": b"jpg%d" % i, "txt": b"txt%d" % i}) for i in range(3)]
    assert pipeline(path, tmp_path) == [(b"jpg%d" % i, f"txt{i}") for i in range(3)]
    assert samples(path, tmp_path / "another") == found, "the index beside the tar knows the rule"
    assert len(samples(path, tmp_path / "cache", key_rule="first_dot")) == 1


def test_where_the_standard_rule_loses_nothing_it_is_webdatasets(tmp_path):
    members = [
        ("d/7.left.jpg", b"l"),
        ("d/7.right.jpg", b"r"),
        ("d/7.json", b"{}"),
        ("d/8.JPG", b"x"),
        ("d/8.seg.png", b"y"),
        ("d/photo.v2.0.jpg", b"z"),
        ("d/photo.v2.0.txt", b"t"),
        ("d/9.image.jpg", b"i"),
        ("d/9.seg.png", b"s"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = samples(path, tmp_path / "cache")
    stock = [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert found == stock


def test_images_that_have_a_text_each_are_samples_of_their_own(tmp_path):
    members = [(f"photo.{name}.{ending}", f"{name}{ending}".encode()) for name in "ab" for ending in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", members)
    assert pipeline(path, tmp_path) == [(b"ajpg", "atxt"), (b"bjpg", "btxt")]


def test_files_of_macos_and_of_file_managers_are_no_members(tmp_path):
    members = [("./._1.jpg", b"\0\5"), ("./1.jpg", b"one"), ("./._1.txt", b"\0\5"), ("./1.txt", b"text")]
    path = write_tar(tmp_path / "a.tar", [*members, ("__MACOSX/._1.jpg", b"\0"), (".DS_Store", b"\0")])
    assert samples(path, tmp_path / "cache") == [("1", {"jpg": b"one", "txt": b"text"})]
    assert pipeline(path, tmp_path) == [(b"one", "text")]


def test_a_key_that_comes_again_is_another_sample_in_stream_and_pipeline(tmp_path):
    members = [
        ("a/1.jpg", b"A"), ("a/1.txt", b"first"), ("a/1.jpg", b"B"), ("a/1.txt", b"second"),
        ("b/1.jpg", b"C"), ("b/1.txt", b"of b"), ("a/1.jpg", b"D"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    expected = [(b"A", b"first"), (b"B", b"second"), (b"C", b"of b"), (b"D", None)]
    assert [(m["jpg"], m.get("txt")) for _, m in samples(path, tmp_path / "cache")] == expected
    assert pipeline(path, tmp_path) == [(image, (text or b"").decode()) for image, text in expected]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["0.jpg", "1.jpg", "0.json", "1.json"], r"a\.tar: the members of 0 do not stand together.*--sort=name"),
        (["0.jpg", "0.jpg", "0.txt", "0.txt"], r"a\.tar: the key 0 comes several times, mixed up"),
    ],
)
def test_a_sample_that_is_torn_apart_is_refused_by_tar_and_key(tmp_path, names, says):
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    with pytest.raises(ShardError, match=says) as error:
        samples(path, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_link_is_refused_by_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"0")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
        tar.addfile(link)
    with pytest.raises(ShardError, match=r"a\.tar: 1\.jpg is a link; .* --dereference"):
        samples(path, tmp_path / "cache")


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path):
    path = write_tar(tmp_path / "a.tar", DATED)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ShardError, match=r"a\.tar: .*decompress it"):
        samples(path, tmp_path / "cache")


def test_the_image_of_a_sample_is_found_by_any_ending_of_an_image(tmp_path):
    pixels = np.full((8, 8, 3), 200, np.uint8)
    for ending, form in [("JPG", "JPEG"), ("bmp", "BMP"), ("gif", "GIF"), ("image.jpg", "JPEG"), ("avif", "AVIF")]:
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, form)
        path = write_tar(tmp_path / f"{form}-{ending}.tar", [(f"1.{ending}", sink.getvalue()), ("1.seg.png", b"no")])
        stream = Stream(str(path), 1, lambda raw, rng: {"image": raw.image()}, mode="evaluate", cache=tmp_path / ending)
        (batch,) = stream
        assert batch["replaced"] == [], ending
        assert np.abs(batch["image"][0].numpy().astype(int) - 200).max() < 8
