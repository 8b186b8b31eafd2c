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


def test_a_parquet_table_whose_columns_are_not_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": URLS, "zzzz": URLS}), tmp_path / "a.parquet", store_schema=False)
    path = tmp_path / "a.parquet"
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"zz\xff\xfe"))
    with pytest.raises(SourceError) as refused:
        open_source(SourceSettings(path=str(path)), str(tmp_path / "out"))
    assert "\n" not in str(refused.value)
