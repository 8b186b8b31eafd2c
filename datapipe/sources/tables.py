"""URL tables: parquet is read in place, csv, tsv and json are read once, streaming."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from datapipe.errors import SourceError
from datapipe.sources.columns import RowFacts, columns_of_table, recognise
from datapipe.sources.index import IndexRow
from datapipe.sources.settings import SourceSettings
from datapipe.sources.storage import InputFile, explained, one_line

PARQUET = (".parquet",)
DELIMITED = {".csv": ",", ".tsv": "\t"}
JSON = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (*PARQUET, *DELIMITED, *JSON)

CACHED_GROUP_BYTES = 256 << 20
"""Row groups of up to this size (decoded, of the needed columns) are kept between slices; larger ones are streamed."""

CSV_BLOCK_BYTES = 16 << 20
"""No row may be longer."""

JSON_CHUNK = 1 << 20
JSON_RECORD_LIMIT = 64 << 20
JSON_KEYS_FROM = 1000
"""Records whose keys are looked at to recognise the columns; not every record needs to have all."""

_BETWEEN_OBJECTS = re.compile(r"[\s,\[\]\ufeff]*")
"""An array's brackets and commas say nothing that its objects do not."""


def count_parquet(files: Sequence[InputFile], settings: SourceSettings) -> list[int]:
    """Rows of each file, from its footer; the columns of each are checked."""

    def count(file: InputFile) -> int:
        with explained(file.url):
            try:
                with fsspec.open(file.url, "rb") as opened:
                    parquet = pq.ParquetFile(opened)
                    rows: int = parquet.metadata.num_rows
                    columns_of_table(parquet.schema_arrow.names, settings, file.url)
            except pa.ArrowException as error:
                raise SourceError(
                    f"input {file.url}: not a parquet file ({one_line(error)}); download it again or take it away"
                ) from None
        return rows

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(count, files))


def read_parquet(
    url: str, version: str, start: int, stop: int, settings: SourceSettings, extra: tuple[str, ...]
) -> Iterator[tuple[RowFacts, dict[str, Any]]]:
    """Rows start to stop - 1 of one file: what is known of each, and the record with its `extra` columns.

    Only the row groups that are needed are read. `version` tells a file from a later one of the same name.
    """
    parquet = _opened(url, version)
    columns = recognise(parquet.schema_arrow.names, settings)
    names = (*columns.names, *extra)
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        low, high = max(start - first, 0), min(stop - first, rows)
        if low < high:
            for record in _rows_of_group(url, version, group, names, low, high).to_pylist():
                yield RowFacts.of(record, columns), record
        first += rows


@functools.lru_cache(maxsize=4)
def _opened(url: str, version: str) -> pq.ParquetFile:
    return pq.ParquetFile(fsspec.open(url, "rb").open())


def _rows_of_group(url: str, version: str, group: int, names: tuple[str, ...], low: int, high: int) -> pa.Table:
    metadata = _opened(url, version).metadata.row_group(group)
    chunks = (metadata.column(i) for i in range(metadata.num_columns))
    decoded = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in names)
    if decoded <= CACHED_GROUP_BYTES:
        return _group(url, version, group, names).slice(low, high - low)
    kept, at = [], 0
    for batch in _opened(url, version).iter_batches(10_000, row_groups=[group], columns=list(names)):
        if at + batch.num_rows > low:
            kept.append(batch.slice(max(low - at, 0), min(high - at, batch.num_rows) - max(low - at, 0)))
        at += batch.num_rows
        if at >= high:
            break
    return pa.Table.from_batches(kept)


@functools.lru_cache(maxsize=2)
def _group(url: str, version: str, group: int, names: tuple[str, ...]) -> pa.Table:
    return _opened(url, version).read_row_group(group, columns=list(names))


def rows_of_tables(files: Sequence[InputFile], settings: SourceSettings) -> Iterator[IndexRow]:
    """Every row of csv, tsv and json files, in order."""
    for file in files:
        with explained(file.url), fsspec.open(file.url, "rb") as opened:
            read = _delimited if file.suffix in DELIMITED else _json
            for row in read(opened, file, settings):
                yield IndexRow(row)


def _delimited(opened: IO[bytes], file: InputFile, settings: SourceSettings) -> Iterator[RowFacts]:
    if not file.size:
        return
    # Quoted newlines are common in alt texts.
    parse = pa_csv.ParseOptions(delimiter=DELIMITED[file.suffix], newlines_in_values=True)
    read = pa_csv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False)
    try:
        names = pa_csv.open_csv(opened, read, parse).schema.names
        columns = columns_of_table(names, settings, file.url)
        # As strings: types guessed from the first block would refuse a later one.
        convert = pa_csv.ConvertOptions(
            include_columns=columns.names,
            column_types=dict.fromkeys(columns.names, pa.string()),
            strings_can_be_null=False,
        )
        opened.seek(0)
        for batch in pa_csv.open_csv(opened, read, parse, convert):
            for record in batch.to_pylist():
                yield RowFacts.of(record, columns)
    except (pa.ArrowException, KeyError) as error:
        raise SourceError(
            f"input {file.url}: not a readable {file.suffix[1:]} ({one_line(error)}); mend it, "
            "or save the table as parquet"
        ) from None


def _json(opened: IO[bytes], file: InputFile, settings: SourceSettings) -> Iterator[RowFacts]:
    records = _json_objects(opened, file)
    head = list(itertools.islice(records, JSON_KEYS_FROM))
    if not head:
        return
    columns = columns_of_table(list(dict.fromkeys(key for record in head for key in record)), settings, file.url)
    for row, record in enumerate(itertools.chain(head, records)):
        if isinstance(record.get(columns.url or ""), (dict, list)):
            raise SourceError(
                f"input {file.url}: the {columns.url} of row {row} is no text; expected one object a row "
                "(pandas: to_json(orient='records', lines=True))"
            )
        yield RowFacts.of(record, columns)


def _json_objects(opened: IO[bytes], file: InputFile) -> Iterator[dict[str, Any]]:
    """The objects of a JSON array or of JSON lines, without ever holding much more than one chunk."""
    decoder, chunks = json.JSONDecoder(), _utf8_chunks(opened, file)
    buffer, at, row = "", 0, 0
    while True:
        at = _BETWEEN_OBJECTS.match(buffer, at).end()  # type: ignore[union-attr]  # matches the empty string too
        try:
            record, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            chunk = next(chunks, "")
            if not chunk and at == len(buffer):
                return
            if not chunk or len(buffer) - at > JSON_RECORD_LIMIT:
                raise SourceError(
                    f"input {file.url}: row {row} is not valid JSON ({one_line(error)}); mend it, or save the table "
                    "as parquet"
                ) from None
            buffer, at = buffer[at:] + chunk, 0
            continue
        if not isinstance(record, dict):
            raise SourceError(
                f"input {file.url}: row {row} is {type(record).__name__} and no object; expected one object with a "
                "url a row"
            )
        yield record
        at, row = end, row + 1


def _utf8_chunks(opened: IO[bytes], file: InputFile) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while chunk := opened.read(JSON_CHUNK):
            if text := decoder.decode(chunk):
                yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise SourceError(f"input {file.url}: not UTF-8 ({one_line(error)}); save it as UTF-8") from None
