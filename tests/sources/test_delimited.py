"""csv, tsv and txt as people have them: quotation marks, headers, delimiters, encodings."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.schema import Reason
from datapipe.sources import delimited
from datapipe.sources.columns import is_place
from tests.sources.inputs import opened, refusal, whole

LONE = '"We will rock you'


def rows_of(folder: Path, name: str, content: str | bytes, **settings: Any) -> list[tuple[str, str]]:
    """(URL, text) of every row of a file of this content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(s.url, s.alt_text) for s in whole(opened(path, folder / "scratch", **settings))]


def urls_and(captions: list[str]) -> list[tuple[str, str]]:
    return [(f"http://x.example/{i}.jpg", caption) for i, caption in enumerate(captions)]


def tsv(rows: list[tuple[str, str]], header: str = "url\tcaption\n") -> str:
    return header + "".join(f"{url}\t{caption}\n" for url, caption in rows)


@pytest.mark.parametrize(
    "captions",
    [
        ["a", LONE, "b", "c"],
        ["a", LONE, "b", '5" screen', "c"],
        ["a", '"Open A', "b", "c", '"Open B', "d"],
        ["a", '"first', '"second', "d"],
        ["a", LONE, "b", 'a television of 12"', "c"],
        ["a", '"Summer" in the city', "b"],
        ["a", 'he said "hi"', 'a 12" record', '"'],
        ["a", "b", LONE],
    ],
)
@pytest.mark.parametrize("caption_first", [False, True])
def test_a_quotation_mark_that_nobody_closes_swallows_no_row(
    tmp_path: Path, captions: list[str], caption_first: bool
) -> None:
    rows = urls_and(captions)
    text = "caption\turl\n" + "".join(f"{c}\t{u}\n" for u, c in rows) if caption_first else tsv(rows)
    assert rows_of(tmp_path, "t.tsv", text) == rows


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.sampled_from('"a ,'), min_size=1, max_size=8), min_size=1, max_size=12))
def test_a_tsv_without_quoting_keeps_every_row_and_its_url(
    tmp_path_factory: pytest.TempPathFactory, captions: list[str]
) -> None:
    rows = urls_and(captions)
    read = rows_of(tmp_path_factory.mktemp("tsv"), "t.tsv", tsv(rows))
    assert [url for url, _ in read] == [url for url, _ in rows]
    literal = rows_of(tmp_path_factory.mktemp("tsv"), "t.tsv", tsv(rows), quoting="none")
    assert literal == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@settings(max_examples=25, deadline=None)
@given(captions=st.lists(st.text(st.sampled_from('"a ,\n\t;|\r☕'), max_size=12), min_size=1, max_size=8))
def test_what_the_csv_module_quotes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, quoting: Any, suffix: str, captions: list[str]
) -> None:
    rows = urls_and(captions)
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter="\t" if suffix == "tsv" else ",", quoting=quoting)
    writer.writerows([("url", "caption"), *rows])
    assert rows_of(tmp_path_factory.mktemp("csv"), f"t.{suffix}", sink.getvalue()) == rows


def test_a_quoted_caption_may_span_lines_that_look_like_rows_but_have_no_url(tmp_path: Path) -> None:
    text = 'url,caption\nhttp://x/1.jpg,"a list:\nsecond, line\n""third"" line"\nhttp://x/2.jpg,b\n'
    assert rows_of(tmp_path, "t.csv", text) == [
        ("http://x/1.jpg", 'a list:\nsecond, line\n"third" line'),
        ("http://x/2.jpg", "b"),
    ]


@pytest.mark.parametrize(
    "caption",
    [
        "two of them:\nhttp://x/8.jpg,the first\nhttp://x/9.jpg,the second\nand no more",
        'she said:\n"http://x/8.jpg",yes\nor "no"',
        "more of them:\n\nhttp://x/more",
    ],
)
def test_a_quoted_caption_may_span_lines_that_are_rows_by_themselves(tmp_path: Path, caption: str) -> None:
    rows = urls_and(["a", caption, "b"])
    sink = io.StringIO()
    csv.writer(sink).writerows([("url", "caption"), *rows])
    assert rows_of(tmp_path, "t.csv", sink.getvalue()) == rows


def test_a_caption_that_ends_in_a_line_like_a_row_is_whole_where_the_file_knows_quoting(tmp_path: Path) -> None:
    caption = "see\nhttp://x/9.jpg,and more"
    rows = urls_and(["a", "first, then second", caption, "b"])
    sink = io.StringIO()
    csv.writer(sink).writerows([("url", "caption"), *rows])
    assert rows_of(tmp_path, "t.csv", sink.getvalue()) == rows
    # Where nothing says so, the mark is one that nobody closed: no row is swallowed.
    text = f'url,caption\nhttp://x/0.jpg,"{caption}"\nhttp://x/1.jpg,b\n'
    assert [url for url, _ in rows_of(tmp_path, "u.csv", text)] == [
        "http://x/0.jpg", "http://x/9.jpg", "http://x/1.jpg"
    ]  # fmt: skip


def test_quotation_marks_escaped_by_a_backslash_are_understood(tmp_path: Path) -> None:
    text = 'url,caption\nhttp://x/1.jpg,"say \\"hi\\", you"\nhttp://x/2.jpg,"5\\" tall"\nhttp://x/3.jpg,"C:\\"\n'
    text += 'http://x/4.jpg,"say \\"hi\\"\nto \\"them\\" all"\n'
    assert [c for _, c in rows_of(tmp_path, "t.csv", text)] == [
        'say "hi", you', '5" tall', "C:\\", 'say "hi"\nto "them" all'
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cc12m.tsv", "http://x/0.jpg\ta\nhttp://x/1.jpg\tb\n", [("http://x/0.jpg", "a"), ("http://x/1.jpg", "b")]),
        (
            "cc3m.tsv",
            "a cat\thttp://x/0.jpg\nb\thttp://x/1.jpg\n",
            [("http://x/0.jpg", "a cat"), ("http://x/1.jpg", "b")],
        ),
        ("urls.txt", "http://x/0.jpg\nhttp://x/1.jpg?a,b\n", [("http://x/0.jpg", ""), ("http://x/1.jpg?a,b", "")]),
        ("urls.csv", "http://x/0.jpg\n\nhttp://x/1.jpg\n", [("http://x/0.jpg", ""), ("http://x/1.jpg", "")]),
    ],
)
def test_a_table_without_a_header_loses_no_row(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str, str]]
) -> None:
    assert rows_of(tmp_path, name, content) == expected


def test_columns_without_a_header_can_be_named_as_the_refusal_says(tmp_path: Path) -> None:
    content = "7\ta cat on a mat\thttp://x/0.jpg\n8\ta dog\thttp://x/1.jpg\n"
    (tmp_path / "t.tsv").write_text(content)
    message = refusal(tmp_path / "t.tsv", tmp_path / "scratch")
    assert "source.columns=[column0,caption,url]" in message
    columns = ("column0", "caption", "url")
    assert rows_of(tmp_path, "t.tsv", content, columns=columns) == [
        ("http://x/0.jpg", "a cat on a mat"),
        ("http://x/1.jpg", "a dog"),
    ]
    assert "has 3 cells" in refusal(tmp_path / "t.tsv", tmp_path / "scratch", columns=("url", "caption"))
    assert "no url column" in refusal(tmp_path / "t.tsv", tmp_path / "scratch", columns=("a", "b", "c"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semicolon.csv", "url;caption\nhttp://x/1.jpg;a\n"),
        ("tab.csv", "url\tcaption\nhttp://x/1.jpg\ta\n"),
        ("comma.tsv", "url,caption\nhttp://x/1.jpg,a\n"),
        ("pipe.csv", "url|caption\nhttp://x/1.jpg|a\n"),
        ("blanks.csv", "url, caption\nhttp://x/1.jpg, a\n"),
        ("quoted-blanks.csv", 'url, "caption"\nhttp://x/1.jpg, "a"\n'),
        ("bom.csv", "\ufeffurl,caption\nhttp://x/1.jpg,a\n"),
        ("utf16.csv", "url,caption\nhttp://x/1.jpg,a\n".encode("utf-16")),
        ("utf16-without-bom.csv", "url,caption\nhttp://x/1.jpg,a\n".encode("utf-16-le")),
        ("crlf.csv", "url,caption\r\nhttp://x/1.jpg,a\r\n"),
        ("old-mac.csv", "url,caption\rhttp://x/1.jpg,a\r"),
        ("no-last-line-end.csv", "url,caption\nhttp://x/1.jpg,a"),
        ("blank-lines.csv", "\nurl,caption\n\nhttp://x/1.jpg,a\n\n"),
        ("pandas-index.csv", ",url,caption\n0,http://x/1.jpg,a\n"),
        ("spreadsheet.csv", "url,caption\nhttp://x/1.jpg,a,,\n"),
        ("upper.CSV", "URL,TEXT\nhttp://x/1.jpg,a\n"),
    ],
)
def test_the_dialect_is_found_out(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert rows_of(tmp_path, name, content) == [("http://x/1.jpg", "a")]


def test_an_encoding_that_cannot_be_known_is_asked_for_and_then_used(tmp_path: Path) -> None:
    content = "url,caption\nhttp://x/1.jpg,café\n".encode("latin-1")
    (tmp_path / "t.csv").write_bytes(content)
    assert "byte 0xe9 in line 2" in refusal(tmp_path / "t.csv", tmp_path / "scratch")
    assert rows_of(tmp_path, "t.csv", content, encoding="latin-1") == [("http://x/1.jpg", "café")]
    assert "no encoding latin1000" in refusal(tmp_path / "t.csv", tmp_path / "scratch", encoding="latin1000")


def test_a_line_in_another_encoding_far_down_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datapipe.sources.dialect.HEAD_BYTES", 64)
    path = tmp_path / "t.csv"
    path.write_bytes(b"url,caption\n" + b"http://x/1.jpg,a\n" * 9 + b"http://x/2.jpg,caf\xe9\nhttp://x/3.jpg,b\n")
    *_, bad, last = whole(opened(path, tmp_path / "scratch"))
    assert bad.verdict is not None and bad.verdict.reason is Reason.UNREADABLE
    assert "t.csv line 11: not in utf-8" in bad.verdict.detail
    assert (last.url, last.alt_text) == ("http://x/3.jpg", "b")


def test_ragged_rows_fail_by_line_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "url,caption\nhttp://x/1.jpg,a\nhttp://x/2.jpg,b, c\nhttp://x/3.jpg\nhttp://x/4.jpg,d\nhttp://x/5.jpg,e\n"
    )
    samples = whole(opened(path, tmp_path / "scratch"))
    assert [s.alt_text for s in samples] == ["a", "", "", "d", "e"]
    assert [s.verdict.detail.partition(";")[0] for s in samples if s.verdict] == [
        "t.csv line 3: 3 cells in place of 2",
        "t.csv line 4: 1 cell in place of 2",
    ]


def test_a_table_most_of_whose_rows_do_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("url,caption\n" + "http://x/1.jpg,a,b\n" * 9)
    assert "9 of its first 9 rows cannot be read (t.csv line 2" in refusal(path, tmp_path / "scratch")


def test_a_line_that_is_too_long_costs_itself_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "LINE_LIMIT", 1 << 20)
    path = tmp_path / "t.csv"
    long = "a" * (3 << 20)
    path.write_text(
        f'url,caption\nhttp://x/0.jpg,a\nhttp://x/1.jpg,{long}\nhttp://x/2.jpg,"b\n{long}\nhttp://x/3.jpg,c'
    )
    source = opened(path, tmp_path / "scratch")
    assert [(s.url, s.alt_text) for s in whole(source)] == [
        ("http://x/0.jpg", "a"), ("", ""), ("http://x/2.jpg", '"b'), ("", ""), ("http://x/3.jpg", "c")
    ]  # fmt: skip
    assert [line for line in source.described() if "longer than" in line] == [
        "not read: t.csv line 3: longer than 1 million characters; mend it, or save the table as parquet",
        "not read: t.csv line 5: longer than 1 million characters; mend it, or save the table as parquet",
    ]


def test_a_table_of_one_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "LINE_LIMIT", 1 << 20)
    path = tmp_path / "t.csv"
    path.write_text("url,caption\nhttp://x/1.jpg," + "a" * (2 << 20))
    assert "line 2: longer than" in refusal(path, tmp_path / "scratch")


def test_hints_are_right_when_they_are_followed(tmp_path: Path) -> None:
    content = "caption;img_link\na;http://x/1.jpg\n"
    (tmp_path / "t.csv").write_text(content)
    assert "set source.url_column=img_link" in refusal(tmp_path / "t.csv", tmp_path / "scratch")
    assert rows_of(tmp_path, "t.csv", content, url_column="img_link") == [("http://x/1.jpg", "a")]


@pytest.mark.parametrize(
    ("value", "is_one"),
    [("http://a.example/x", True), ("a.heic", True), ("in\\b.JPG", True), ("heic", False), ("images/.jpg", False)],
)
def test_a_place_has_a_name_and_the_ending_of_an_image(value: str, is_one: bool) -> None:
    assert is_place(value) is is_one
