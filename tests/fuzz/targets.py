"""What is fed with what strangers may send, and how it may end: with a result, or with the error of its kind."""

from __future__ import annotations

import contextlib
import datetime
import io
import socket
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datapipe.decoding import decode_image, normalize
from datapipe.image_file import ImageRefusedError
from datapipe.metadata import jpeg_header, without_metadata
from datapipe.schema import RLE, from_json, to_json
from datapipe.sources import SourceSettings, parquet_tables
from datapipe.sources.arrow_tables import read_arrow
from datapipe.sources.delimited import read_delimited
from datapipe.sources.input_files import InputFile
from datapipe.sources.json_tables import read_json
from datapipe.sources.parquet_tables import open_parquet, read_parquet
from datapipe.sources.row_index import DamagedError, Found, InputRow
from datapipe.sources.tars import members_of
from datapipe.sources.tfrecords import read_tfrecords
from datapipe.stages.byte_budget import ByteBudget
from datapipe.stages.http_get import Deadline, Exchange, HttpError
from datapipe.stages.opt_outs import RobotsTxt, opts_out
from datapipe.stages.retry_after import LONGEST_S, retry_after_s
from datapipe.stages.urls import BadUrlError, normal_url, redirected, target
from subject_diffusion.errors import ShardError
from tests.conftest import jpeg
from tests.fuzz import inputs
from train.stream.tar_sample import CorruptSampleError, parse_members


def read_sample(data: bytes) -> None:
    try:
        sample = from_json(data)
    except ShardError:
        return
    assert to_json(from_json(to_json(sample))) == to_json(sample)
    for entity in sample.entities:
        if entity.mask is not None:
            assert entity.mask.array().shape == (sample.height, sample.width)


def read_mask(encoded: tuple[tuple[int, int], str]) -> None:
    mask = RLE(*encoded)
    try:
        array = mask.array()
    except ValueError:
        assert not mask.is_whole()
        return
    assert int(array.sum()) == mask.area
    assert coco_mask.decode(RLE.of(array).to_coco()).astype(bool).tolist() == array.tolist()


def read_tar(data: bytes) -> None:
    try:
        for member in members_of(io.BytesIO(data)):
            assert member.size >= 0
    except tarfile.TarError:
        pass
    try:
        _, spans = parse_members(memoryview(data))
    except CorruptSampleError:
        return
    assert all(0 <= start <= end <= len(data) for start, end in spans.values())


def read_picture(data: bytes) -> None:
    for read in (lambda: normalize(data, 1_000_000), lambda: decode_image(data)):
        with contextlib.suppress(ImageRefusedError):
            read()
    if data[:2] == b"\xff\xd8":
        jpeg_header(data)
        without_metadata(data)


Reader = Callable[[Any, InputFile, SourceSettings, Found], Iterator[InputRow]]


def table(reader: Reader, name: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        file = InputFile(f"/{name}", name, len(data), "")
        try:
            for row in reader(io.BytesIO(data), file, SourceSettings(), Found()):
                assert "\n" not in row.problem
        except DamagedError:
            pass

    return read


def read_parquet_file(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".parquet") as target:
        target.write(data)
        target.flush()
        file = InputFile(target.name, Path(target.name).name, len(data), "")
        (opened,) = open_parquet([file], SourceSettings(), Found())
        # A footer may claim any number of rows.
        _exhausted(read_parquet(opened, target.name, 0, min(opened.rows, 100), SourceSettings()))


def read_large_parquet_file(data: bytes) -> None:
    """As one whose row groups are too large to be kept."""
    with mock.patch.object(parquet_tables, "CACHED_GROUP_BYTES", 0):
        read_parquet_file(data)


def _exhausted(rows: Iterable[object]) -> None:
    for _ in rows:
        pass


def read_url(url: str) -> None:
    for read in (normal_url, lambda given: redirected("http://example.com/a?b", given)):
        with contextlib.suppress(BadUrlError):
            normal = read(url)
            assert normal_url(normal) == normal
            assert normal.isascii()
            assert 0 <= target(normal).port < 65536
            assert target(normal).path.startswith("/")


def read_answer(data: bytes) -> None:
    """As a server sends it, over a socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        until = time.monotonic() + 60
        deadline = Deadline(until, 60, pauses_until=until)
        with (
            contextlib.suppress(OSError, HttpError),
            Exchange(ours, target("http://a.b/c"), "fuzz", deadline) as exchange,
            ByteBudget(1000).download() as take,
        ):
            for value in exchange.values("retry-after"):
                read_retry_after(value)
            opts_out(exchange.values("x-robots-tag"), "bot")
            assert len(exchange.body(1000, take)) <= 1000


def read_retry_after(value: str) -> None:
    seconds = retry_after_s(value, datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))
    assert seconds is None or 0 <= seconds <= LONGEST_S


def read_header(value: str) -> None:
    read_retry_after(value)
    opts_out([value], "bot")


def read_robots_txt(text: str) -> None:
    RobotsTxt("bot", lambda url, until: (200, text)).allows("http://a.b/c.jpg?d", time.monotonic() + 60)


def good_table(write: Callable[[pa.Table, Any], None]) -> bytes:
    sink = io.BytesIO()
    write(pa.table({"url": ["http://a.b/c.jpg", None], "image": [b"x", None], "caption": ["a", "b"]}), sink)
    return sink.getvalue()


def write_arrow(rows: pa.Table, sink: Any) -> None:
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)


TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "sample": (inputs.sample_json() | st.binary(max_size=60), read_sample),
    "mask": (inputs.rle(), read_mask),
    "tar": (inputs.tar() | st.binary(max_size=2000), read_tar),
    "url": (inputs.url() | st.text(), read_url),
    "answer": (inputs.answer() | st.binary(max_size=300), read_answer),
    "header": (inputs.header_values, read_header),
    "robots": (inputs.robots_txt(), read_robots_txt),
    "picture": (inputs.mutated(jpeg()), read_picture),
    "delimited": (inputs.delimited(), table(read_delimited, "a.csv")),
    "json": (inputs.json_table(), table(read_json, "a.json")),
    "tfrecord": (inputs.tfrecord(), table(read_tfrecords, "a.tfrecord")),
    "arrow": (inputs.mutated(good_table(write_arrow)), table(read_arrow, "a.arrow")),
    "parquet": (inputs.mutated(good_table(pq.write_table)), read_parquet_file),
    "large-parquet": (inputs.mutated(good_table(pq.write_table)), read_large_parquet_file),
}
"""What is made up, and what reads it; whatever that raises is a fault."""
