"""Tars as people have them: keys, links, endings, duplicates, compression, damage."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.schema import Reason
from datapipe.sources import InputRows
from datapipe.sources.tar_keys import group_members
from datapipe.sources.tars import Member, TarContent, groups_of
from datapipe.sources.temporary_database import temporary_database
from tests.sources.inputs import opened, refusal, whole, write_tar

Found = list[tuple[bytes | None, str]]


def found(source: InputRows) -> Found:
    """(image, text) of every row."""
    return [(sample.image, sample.alt_text) for sample in whole(source)]


def numbered(count: int) -> list[tuple[str, bytes]]:
    return [(f"{i}.{e}", f"{e} {i}".encode()) for i in range(count) for e in ("jpg", "txt")]


def expected(count: int) -> Found:
    return [(f"jpg {i}".encode(), f"txt {i}") for i in range(count)]


def test_dots_in_names_lose_and_merge_nothing(tmp_path: Path) -> None:
    stems = ["photo 0.v2.0", "photo 1.v2.0", "plain"]
    members = [(f"{stem}.{e}", f"{stem} {e}".encode()) for stem in stems for e in ("jpg", "txt")]
    members += [("cam.rgb.jpg", b"cam"), ("cam.caption.txt", b"of cam")]
    assert found(opened(write_tar(tmp_path / "a.tar", members), tmp_path / "scratch")) == [
        *((f"{stem} jpg".encode(), f"{stem} txt") for stem in stems),
        (b"cam", "of cam"),
    ]


def test_the_key_rule_is_found_out_said_and_can_be_set(tmp_path: Path) -> None:
    dated = [(f"IMG_2020.01.0{i}.{e}", f"{e} {i}".encode()) for i in range(3) for e in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", dated)
    source = opened(path, tmp_path / "scratch")
    assert found(source) == expected(3)
    assert any("last dot" in line and "source.key_rule=first_dot" in line for line in source.described())
    first = opened(path, tmp_path / "scratch", key_rule="first_dot")
    assert first.rows == 1
    assert any("2 images beyond the first of a key" in line for line in first.described())
    together = [("7.left.jpg", b"l"), ("7.right.jpg", b"r"), ("7.json", b'{"caption": "both"}')]
    path = write_tar(tmp_path / "b.tar", together)
    assert found(opened(path, tmp_path / "scratch")) == [(b"l", "both")]
    assert opened(path, tmp_path / "scratch", key_rule="last_dot").rows == 3


def test_members_of_a_sample_are_joined_wherever_they_lie(tmp_path: Path) -> None:
    members = sorted(numbered(5), key=lambda member: member[0].split(".")[1])
    assert found(opened(write_tar(tmp_path / "a.tar", members), tmp_path / "scratch")) == expected(5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab.\udcff"), min_size=1, max_size=5), max_size=12), st.booleans())
def test_a_tar_in_the_database_has_the_samples_that_its_names_make(names: list[str], first: bool) -> None:
    rule: Literal["first_dot", "last_dot"] = "first_dot" if first else "last_dot"
    with temporary_database() as database:
        content = TarContent(database)
        content.add(Member(name, 0, 0) for name in names)
        found = list(groups_of(content, rule))
    # The database counts from 1.
    assert [replace(group, members=tuple(n - 1 for n in group.members)) for group in found] == group_members(
        names, rule
    )


def test_what_macos_and_file_managers_leave_is_no_sample(tmp_path: Path) -> None:
    members = [("./._0.jpg", b"\0"), ("./0.jpg", b"jpg 0"), ("./._0.txt", b"\0"), ("./0.txt", b"txt 0")]
    members += [("__MACOSX/._0.jpg", b"\0"), (".DS_Store", b"\0"), (".thumbnails/0.jpg", b"\0")]
    assert found(opened(write_tar(tmp_path / "a.tar", members), tmp_path / "scratch")) == expected(1)


def test_links_lead_to_their_images(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("d/0.jpg", b"image"), ("d/0.txt", b"a")])
    with tarfile.open(path, "a") as tar:
        for name, kind, target in [
            ("d/1.jpg", tarfile.LNKTYPE, "d/0.jpg"),
            ("d/2.jpg", tarfile.SYMTYPE, "1.jpg"),
            ("d/3.jpg", tarfile.SYMTYPE, "../../etc/passwd"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    *good, nowhere = whole(opened(path, tmp_path / "scratch"))
    assert [s.image for s in good] == [b"image"] * 3
    assert nowhere.image is None and nowhere.verdict is not None
    assert "d/3.jpg is a link" in nowhere.verdict.detail


def test_every_ending_of_an_image_makes_a_row_with_its_text(tmp_path: Path) -> None:
    jpeg = b"\xff\xd8\xff\xe0 and so on"
    members = [("1.JPG", jpeg), ("1.JSON", b'{"caption": "one"}'), ("2.jfif", jpeg), ("2.caption", b"two")]
    members += [(f"{ending}.{ending}", jpeg) for ending in ("jpeg", "webp", "avif", "heic", "jxl", "tif")]
    members += [("9.image.jpg", jpeg), ("9.txt", b"\xef\xbb\xbfnine"), ("10.photo", jpeg)]
    members += [("README.md", b"# read me"), ("11.cls", b"3")]
    source = opened(write_tar(tmp_path / "a.tar", members), tmp_path / "scratch")
    assert [text for _, text in found(source)] == ["one", "two", *[""] * 6, "nine", ""]
    assert all(sample.image == jpeg for sample in whole(source))
    assert any("README.md is left out" in line for line in source.described())


def test_a_key_that_comes_again_is_another_sample_and_no_text_is_anothers(tmp_path: Path) -> None:
    members = [
        ("a/1.jpg", b"A"), ("a/1.txt", b"first"), ("a/1.jpg", b"B"), ("a/1.txt", b"second"),
        ("b/1.jpg", b"C"), ("b/1.txt", b"of b"), ("a/1.jpg", b"D"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    assert found(opened(path, tmp_path / "scratch")) == [(b"A", "first"), (b"B", "second"), (b"C", "of b"), (b"D", "")]
    mixed = write_tar(tmp_path / "b.tar", [("1.jpg", b"A"), ("1.jpg", b"B"), ("1.txt", b"a"), ("1.txt", b"b")])
    source = opened(mixed, tmp_path / "scratch")
    assert found(source) == [(b"A", ""), (b"B", "")]
    assert any("the key 1 comes several times" in line for line in source.described())


def test_captions_in_lists_are_texts(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.json", b'{"caption": ["a cat", "a small cat"]}')])
    assert found(opened(path, tmp_path / "scratch")) == [(b"x", "a cat")]
    assert found(opened(path, tmp_path / "scratch", alt_text_choice=1)) == [(b"x", "a small cat")]


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, _zstd])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.zst"])
def test_compressed_tars_are_read_whatever_their_name(
    tmp_path: Path, compress: Callable[[bytes], bytes], name: str
) -> None:
    plain = write_tar(tmp_path / "plain", numbered(30)).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(compress(plain))
    source = opened(tmp_path / "in", tmp_path / "scratch")
    assert found(source) == expected(30)
    assert [s.image for s in source.read(17, 20)] == [b"jpg 17", b"jpg 18", b"jpg 19"]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, _zstd])
def test_one_damaged_tar_among_others_costs_its_own_rows(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    folder = tmp_path / "in"
    for number in range(3):
        (folder / f"{number}").mkdir(parents=True)
        write_tar(folder / f"{number}" / "a.tar", numbered(4))
    whole_tar = (folder / "1" / "a.tar").read_bytes()
    (folder / "1" / "a.tar").write_bytes(compress(whole_tar)[: len(compress(whole_tar[:3000]))])
    (folder / "0" / "empty.tar").touch()
    source = opened(folder, tmp_path / "scratch")
    lost = [sample.verdict for sample in whole(source) if sample.verdict]
    assert len([s for s in whole(source) if s.image]) >= 8
    assert [v.reason for v in lost] == [Reason.UNREADABLE] * len(lost)
    assert {v.detail.split(":")[0] for v in lost} == {"0/empty.tar", "1/a.tar"}
    assert all(name in "\n".join(source.described()) for name in ("0/empty.tar", "1/a.tar"))
    assert "0/empty.tar: not a whole tar" in refusal(folder, tmp_path / "another", strict=True)


def test_img2dataset_tars_in_folders_with_a_logo_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "00000").mkdir(parents=True)
    write_tar(folder / "00000" / "00000.tar", numbered(2))
    (folder / "00000" / "00000_stats.json").write_text(json.dumps({"count": 2}))
    (folder / "README.md").write_text("# Data")
    (folder / "logo.png").write_bytes(b"\x89PNG")
    assert found(opened(folder, tmp_path / "scratch")) == expected(2)
