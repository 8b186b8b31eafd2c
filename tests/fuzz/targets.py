"""What is fed with what strangers may send, and how it may end: with a result, or with the error of its kind."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datapipe.decoding import ImageRefusedError, decode_image, normalize
from datapipe.metadata import jpeg_header, without_metadata
from datapipe.schema import RLE, from_json, to_json
from datapipe.sources import SourceSettings
from datapipe.sources.arrow_tables import read_arrow
from datapipe.sources.delimited import read_delimited
from datapipe.sources.input_files import InputFile
from datapipe.sources.json_tables import read_json
from datapipe.sources.parquet_tables import open_parquet, read_parquet
from datapipe.sources.row_index import DamagedError, Found, InputRow
from datapipe.sources.tars import members_of
from datapipe.sources.tfrecords import read_tfrecords
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


def _exhausted(rows: Iterable[object]) -> None:
    for _ in rows:
        pass


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
    "picture": (inputs.mutated(jpeg()), read_picture),
    "delimited": (inputs.delimited(), table(read_delimited, "a.csv")),
    "json": (inputs.json_table(), table(read_json, "a.json")),
    "tfrecord": (inputs.tfrecord(), table(read_tfrecords, "a.tfrecord")),
    "arrow": (inputs.mutated(good_table(write_arrow)), table(read_arrow, "a.arrow")),
    "parquet": (inputs.mutated(good_table(pq.write_table)), read_parquet_file),
}
"""What is made up, and what reads it; whatever that raises is a fault."""
