"""Tables that would end the process: what the fuzzers found, one case each."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datapipe.sources import SourceSettings, open_source
from datapipe.sources.arrow_tables import read_arrow
from datapipe.sources.input_files import InputFile
from datapipe.sources.row_index import DamagedError, Found
from subject_diffusion.errors import SourceError

URLS = pa.array([f"http://a.b/{n}.jpg" for n in range(3)])


def stream(rows: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_batch(rows)
    return sink.getvalue()


def with_offsets(*offsets: int) -> bytes:
    """Texts that begin and end there, whatever there is."""
    data = stream(pa.record_batch([URLS, pa.array(["a", "b", "c"])], ["url", "caption"]))
    return data.replace(struct.pack("<4i", 0, 1, 2, 3), struct.pack("<4i", *offsets))


GOOD = stream(pa.record_batch([URLS], ["url"]))
HEAD = 8 + int.from_bytes(GOOD[4:8], "little")
"""Bytes of the schema's message."""

ARROW = {
    "offsets out of the memory": with_offsets(0, 1, 2**30, 3),
    "offsets that go back": with_offsets(3, 2, 1, 0),
    "a batch in place of the schema": GOOD[HEAD:],
    "texts that are not UTF-8": GOOD.replace(b"http://a.b/1", b"http://a.\xff/1"),
    "columns that are not UTF-8": GOOD.replace(b"url", b"ur\xff"),
    "an end within a batch": GOOD[: HEAD + 100],
    "nothing but a mark": GOOD[:4],
}


@pytest.mark.parametrize("case", ARROW)
def test_a_hostile_arrow_file_is_damaged_and_no_more(case: str) -> None:
    file = InputFile("/a.arrow", "a.arrow", len(ARROW[case]), "")
    with pytest.raises(DamagedError):
        list(read_arrow(io.BytesIO(ARROW[case]), file, SourceSettings(), Found()))


def test_a_text_of_a_parquet_table_that_is_not_utf8_costs_no_row(tmp_path: Path) -> None:
    captions = pa.array([b"a cat", b"caf\xe9", b"a dog"]).view(pa.string())
    pq.write_table(pa.table({"url": URLS, "caption": captions}), tmp_path / "a.parquet")
    rows = open_source(SourceSettings(path=str(tmp_path / "a.parquet")), str(tmp_path / "out"))
    assert [(s.url, s.alt_text) for s in rows.read(0, 3)] == [
        ("http://a.b/0.jpg", "a cat"),
        ("http://a.b/1.jpg", "caf�"),
        ("http://a.b/2.jpg", "a dog"),
    ]


ROWS = 300
HISTOGRAM, DAMAGED = b"\x26\x00\xd8\x04", b"\x36\x00\x58\x04"
"""In a footer: two numbers, how many of 300 values are null and how many are not; and three, which no column has."""


@pytest.mark.parametrize("column", ["url", "other"])
def test_a_large_row_group_with_damaged_statistics_does_not_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    """pyarrow's `RowGroupMetaData.column` does."""
    monkeypatch.setattr("datapipe.sources.parquet_tables.CACHED_GROUP_BYTES", 0)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({name: pa.array([name] * ROWS) for name in ("url", "other")}), path)
    of_url, of_other = path.read_bytes().split(HISTOGRAM)[:2], path.read_bytes().split(HISTOGRAM)[2]
    data = (HISTOGRAM if column == "other" else DAMAGED).join(of_url)
    path.write_bytes(data + (DAMAGED if column == "other" else HISTOGRAM) + of_other)
    rows = list(open_source(SourceSettings(path=str(path)), str(tmp_path / "out")).read(0, ROWS))
    assert len(rows) == ROWS
    assert all((row.verdict is None) == (column == "other") for row in rows)
    assert column == "other" or "histogram" in ((rows[0].verdict and rows[0].verdict.detail) or "")


def test_a_row_group_without_the_rows_that_its_footer_tells_of_loses_none_unsaid(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"url": ["a"] * ROWS}), path)
    head, _, tail = path.read_bytes().rpartition(WITH_METADATA)
    path.write_bytes(head + WITHOUT_METADATA + tail)
    rows = list(open_source(SourceSettings(path=str(path)), str(tmp_path / "out")).read(0, ROWS))
    assert len(rows) == ROWS
    assert all(row.verdict and "fewer rows" in row.verdict.detail for row in rows)


WITH_METADATA, WITHOUT_METADATA = b"\x26\x00\x1c", b"\x26\x00\x2c"
"""In a footer: a column chunk with its metadata as field 3; and as field 4, which is something else."""


def test_a_parquet_table_whose_columns_are_not_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": URLS, "zzzz": URLS}), tmp_path / "a.parquet", store_schema=False)
    path = tmp_path / "a.parquet"
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"zz\xff\xfe"))
    with pytest.raises(SourceError) as refused:
        open_source(SourceSettings(path=str(path)), str(tmp_path / "out"))
    assert "\n" not in str(refused.value)
