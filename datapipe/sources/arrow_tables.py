"""Arrow files, as Hugging Face `datasets` keeps them on disk. Their images are read where they lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from datapipe.sources.columns import Columns, row_of
from datapipe.sources.input_files import InputFile
from datapipe.sources.parquet_tables import columns_of_schema
from datapipe.sources.row_index import DamagedError, Found, ImagePlace, InputRow
from datapipe.sources.settings import SourceSettings
from subject_diffusion.errors import one_line

FILE_MAGIC = b"ARROW1\0\0"
"""What an Arrow file begins with; the stream that `datasets` writes has no such head, and is the same from there on."""


def read_arrow(table: IO[bytes], file: InputFile, settings: SourceSettings, found: Found) -> Iterator[InputRow]:
    """Every row of a table. No more than one record batch is held at a time."""
    if table.read(len(FILE_MAGIC)) != FILE_MAGIC:
        table.seek(0)
    try:
        source = pa.PythonFile(table, mode="r")
        messages = pa.ipc.MessageReader.open_stream(source)
        try:
            head = messages.read_next_message()
            is_schema = head.type == "schema"  # another one read as a schema ends the process
        except StopIteration:
            is_schema = False
        if not is_schema:
            raise DamagedError(f"input {file.url}: an arrow file without a schema; write it again, or take it away")
        schema = pa.ipc.read_schema(head)
        columns, words = columns_of_schema(schema, settings, file.url)
        found.words = found.words or words
        while (batch := _next_batch(messages, schema, table, file)) is not None:
            yield from _rows(batch, columns, file, settings)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedError(
            f"input {file.url}: not a whole arrow file ({one_line(error)}); write it again, or save it as parquet"
        ) from None


@dataclass(frozen=True)
class _Batch:
    """`start`: where in the file the bytes begin that the batch was read from, and `address`, where in memory."""

    rows: pa.RecordBatch
    start: int
    address: int
    size: int


def _next_batch(messages: Any, schema: pa.Schema, table: IO[bytes], file: InputFile) -> _Batch | None:
    try:
        message = messages.read_next_message()
    except StopIteration:
        return None
    if message.type != "record batch":
        raise DamagedError(f"input {file.url}: its {message.type} cannot be read in place; save it as parquet")
    rows = pa.ipc.read_record_batch(message, schema)
    # Arrow believes the offsets of a file, and would follow them out of its memory.
    rows.validate(full=True)
    return _Batch(rows, table.tell() - message.body.size, message.body.address, message.body.size)


def _rows(batch: _Batch, columns: Columns, file: InputFile, settings: SourceSettings) -> Iterator[InputRow]:
    records = batch.rows
    images = records.schema.get_field_index(columns.image or "")
    if images < 0 or (content := _content(records.column(images))) is None:
        yield from (row_of(record, columns, settings, file.folder) for record in records.to_pylist())
        return
    # Only where the images lie: a copy of each as a Python object would be twice the memory.
    places = _places(content, batch, file)
    paths = records.column(images).field("path").to_pylist() if _has_paths(records.column(images)) else None
    for number, record in enumerate(records.remove_column(images).to_pylist()):
        record[columns.image] = paths[number] if paths is not None else None
        row = row_of(record, columns, settings, file.folder)
        yield row if (place := places[number]) is None else InputRow(row.facts, place)


def _content(column: pa.Array) -> pa.Array | None:
    """The images of a column, (rows,) binary; None if it has none."""
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        return _content(column.field("bytes")) if "bytes" in names else None
    return column if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type) else None


def _has_paths(column: pa.Array) -> bool:
    return pa.types.is_struct(column.type) and "path" in [field.name for field in column.type]


def _places(content: pa.Array, batch: _Batch, file: InputFile) -> list[ImagePlace | None]:
    """Where in the file each image lies; None where there is none."""
    _, offsets, data = content.buffers()
    begin = data.address - batch.address if data is not None and data.size else 0
    if not 0 <= begin <= batch.size:
        raise DamagedError(f"input {file.url}: its record batches are compressed; save it as parquet")
    width = np.int64 if pa.types.is_large_binary(content.type) else np.int32
    ends = np.frombuffer(offsets or bytes(8), width)[content.offset : content.offset + len(content) + 1].tolist()
    name, first = os.fsencode(file.name), batch.start + begin
    return [
        ImagePlace(name, first + ends[n], ends[n + 1] - ends[n]) if present else None
        for n, present in enumerate(content.is_valid().to_pylist())
    ]
