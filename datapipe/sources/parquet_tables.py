"""Parquet tables, of URLs, paths or images, read in place."""

from __future__ import annotations

import functools
import itertools
import posixpath
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.sources.columns import Columns, columns_of_table, row_of
from datapipe.sources.compression import is_compressed
from datapipe.sources.input_files import InputFile, explained, input_file_system
from datapipe.sources.row_index import PROBLEMS_NAMED, DamagedError, Found, InputRow
from datapipe.sources.settings import SourceSettings
from subject_diffusion.errors import one_line

CACHED_GROUP_BYTES = 256 << 20
"""Row groups of up to this size (decoded, of the needed columns) are kept between slices; larger ones are streamed."""

BATCH_BYTES = 64 << 20
"""Decoded bytes that are held at once of a row group that is streamed."""
BATCH_ROWS = 10_000
CACHED_GROUPS = 2
FILES_AT_ONCE = 16
"""Whose footers are read: in a bucket, most of the time is waiting."""

_Group = tuple[str, str, int, tuple[str, ...]]
"""URL and version of a file, number of the row group, and columns."""


@dataclass(frozen=True)
class Table:
    """A parquet file of the input. `name`: relative to the input's root; `problem`: why none of its rows can be read;
    `shard`: the folder of the images that img2dataset saved beside it, relative to the root, and their ending."""

    url: str
    rows: int
    name: str = ""
    problem: str = ""
    shard: tuple[str, str] | None = None


def open_parquet(
    files: Iterable[InputFile],
    settings: SourceSettings,
    found: Found,
    shard_of: Callable[[InputFile], tuple[str, str] | None] | None = None,
) -> Iterator[Table]:
    """Every file with its rows, from its footer. A damaged one counts as one row, or as the rows that its footer tells.
    `shard_of`: of img2dataset's "files". Raises SourceError, of damage if `settings.strict`."""

    def opened_one(file: InputFile) -> tuple[Table, str]:
        rows = 1
        try:
            with explained(file.url):
                rows, schema = _footer(file)
                _, words = columns_of_schema(schema, settings, file.url)
        except DamagedError as error:
            if settings.strict:
                raise
            return Table(file.url, rows, file.name, error.about(file.url, file.name)), ""
        return Table(file.url, rows, file.name), words

    files = iter(files)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        while some := list(itertools.islice(files, 10 * FILES_AT_ONCE)):
            for file, (table, words) in zip(some, pool.map(opened_one, some), strict=True):
                found.words = found.words or words
                if table.problem:
                    found.lost += table.rows
                    found.problems += [table.problem][: PROBLEMS_NAMED - len(found.problems)]
                elif shard_of is not None:
                    table = replace(table, shard=shard_of(file))
                yield table


def _footer(file: InputFile) -> tuple[int, pa.Schema]:
    """Rows and columns. Raises DamagedError."""
    fs, inner = input_file_system(file.url)
    with fs.open(inner, "rb") as opened:
        try:
            parquet = pq.ParquetFile(opened)
            return parquet.metadata.num_rows, parquet.schema_arrow
        except (pa.ArrowException, UnicodeDecodeError) as error:
            opened.seek(0)
            what = (
                "parquet within gzip or the like; decompress it"
                if is_compressed(opened)
                else (f"not a parquet file ({one_line(error)}); download it again or take it away")
            )
            raise DamagedError(f"input {file.url}: {what}") from None


def _names(schema: pa.Schema) -> tuple[list[str], dict[str, pa.DataType]]:
    """The columns, those inside structs after a dot, and their types."""
    names = list(schema.names)
    types = {column.name: column.type for column in schema}
    for column in schema:
        if pa.types.is_struct(column.type):
            inner = {f"{column.name}.{child.name}": child.type for child in column.type}
            names += [name for name in inner if name not in types]
            types = inner | types
    return names, types


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_map, pa.types.is_struct))


def columns_of_schema(schema: pa.Schema, settings: SourceSettings, where: str) -> tuple[Columns, str]:
    """The columns of an Arrow schema, and what they are in words. Raises DamagedError."""
    try:
        names, types = _names(schema)
    except UnicodeDecodeError:
        raise DamagedError(f"input {where}: names of columns that are not UTF-8; write it again") from None
    columns = columns_of_table(names, settings, where, types)
    texts = [n for n in (columns.url, columns.alt_text, columns.licence) if n is not None and _is_list(types[n])]
    return columns, columns.described(len(schema.names), texts, settings.alt_text_choice)


def read_parquet(table: Table, version: str, start: int, stop: int, settings: SourceSettings) -> Iterator[InputRow]:
    """Rows start to stop - 1 of one file. Only the row groups that are needed are read; the rows of a damaged one are
    rows with a problem. `version` tells a file from a later one of the same name."""
    if table.problem:
        yield from (InputRow.lost(table.problem) for _ in range(start, stop))
        return
    parquet = _parquet(table.url, version)
    columns, _ = columns_of_schema(parquet.schema_arrow, settings, table.url)
    names = _read_names(columns, parquet.schema_arrow, table)
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        low, high = max(start - first, 0), min(stop - first, rows)
        at = low
        try:
            with explained(table.url):
                for record in _records_of_group(table.url, version, group, names, low, high):
                    at += 1
                    yield _row(record, columns, settings, table)
                if at < high:
                    raise DamagedError(f"input {table.url}: fewer rows than its footer says; download it again")
        except DamagedError as error:
            if settings.strict:
                raise
            yield from (InputRow.lost(error.about(table.url, table.name)) for _ in range(at, high))
        first += rows


def _row(record: Mapping[str, object], columns: Columns, settings: SourceSettings, table: Table) -> InputRow:
    if table.shard is not None:
        folder, ending = table.shard
        saved = record.get("status") == "success"
        record = {**record, "file_name": f"{folder}/{record.get('key')}.{ending}" if saved else None}
        return row_of(record, _with_saved_images(columns), settings, "")
    return row_of(record, columns, settings, posixpath.dirname(table.name))


def _with_saved_images(columns: Columns) -> Columns:
    return Columns(columns.url, "file_name", columns.alt_text, columns.licence, columns.scores, "status")


def _read_names(columns: Columns, schema: pa.Schema, table: Table) -> tuple[str, ...]:
    beside = ("key", "status", "error_message") if columns.status or table.shard else ()
    return (*columns.names, *(n for n in beside if n in schema.names and n not in columns.names))


@functools.lru_cache(maxsize=4)
def _parquet(url: str, version: str) -> pq.ParquetFile:
    fs, inner = input_file_system(url)
    return pq.ParquetFile(fs.open(inner, "rb"))


@functools.lru_cache(maxsize=4)
def _with_dictionaries(url: str, version: str) -> pq.ParquetFile:
    """The file, of which texts stay what they are in it: numbers of a dictionary's. Decoded, a text of a megabyte that
    a million rows have would be a terabyte, of which the footer says nothing."""
    plain = _parquet(url, version)
    texts = [column.name for column in plain.schema_arrow if column.type in {*_BINARY, *_BINARY.values()}]
    fs, inner = input_file_system(url)
    return pq.ParquetFile(fs.open(inner, "rb"), metadata=plain.metadata, read_dictionary=texts)


@dataclass
class _Groups:
    """The row groups that were read last, whole, and which ones are too large for that."""

    whole: OrderedDict[_Group, pa.Table] = field(default_factory=OrderedDict)
    too_large: set[_Group] = field(default_factory=set)

    def keep(self, group: _Group, table: pa.Table) -> None:
        self.whole[group] = table
        if len(self.whole) > CACHED_GROUPS:
            self.whole.popitem(last=False)


_groups = _Groups()


def _records_of_group(
    url: str, version: str, group: int, names: tuple[str, ...], low: int, high: int
) -> Iterator[dict[str, object]]:
    """Rows low to high - 1 of a row group."""
    if low >= high:
        return
    key = url, version, group, names
    if (table := _groups.whole.get(key)) is not None:
        yield from _records(table.slice(low, high - low))
        return
    parquet = _with_dictionaries(url, version)
    metadata = parquet.metadata.row_group(group)
    at_once = max(1, min(BATCH_ROWS, int(BATCH_BYTES * metadata.num_rows / max(metadata.total_byte_size, 1))))
    batches = parquet.iter_batches(at_once, row_groups=[group], columns=list(names))
    # To ask for a column's metadata ends the process where they are damaged, because pyarrow lets no exception of C++
    # through there. To read the column raises, as it should.
    first = next(batches, None)
    if first is None:
        return
    if key not in _groups.too_large and _bytes_of(parquet, group, names) <= CACHED_GROUP_BYTES:
        table = pa.Table.from_batches([first, *batches])
        _groups.keep(key, table)
        yield from _records(table.slice(low, high - low))
        return
    _groups.too_large.add(key)
    at = 0
    for batch in itertools.chain([first], batches):
        wanted = batch.slice(max(low - at, 0), max(min(high - at, batch.num_rows) - max(low - at, 0), 0))
        yield from _records(pa.Table.from_batches([wanted]))
        at += batch.num_rows
        if at >= high:
            return


def _records(rows: pa.Table) -> list[dict[str, object]]:
    """Rows in Python's types. Texts that are not UTF-8 come as bytes. Raises DamagedError."""
    try:
        columns = [[value for chunk in column.chunks for value in _values(chunk)] for column in rows.columns]
    except (ValueError, OverflowError) as error:  # of inner texts, and of times that Python does not know
        raise DamagedError(f"input: a value that cannot be read ({one_line(error)}); write it again") from None
    return [dict(zip(rows.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(chunk: pa.Array) -> list[object]:
    """A column's values; those of a dictionary that rows share are one object."""
    if pa.types.is_dictionary(chunk.type):
        used = chunk.indices.unique().drop_null()
        values = dict(zip(used.to_pylist(), _values(chunk.dictionary.take(used)), strict=True))
        return [values.get(number) for number in chunk.indices.to_pylist()]
    try:
        return list(chunk.to_pylist())
    except UnicodeDecodeError:
        return list(chunk.cast(_BINARY.get(chunk.type, chunk.type)).to_pylist())


_BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def _bytes_of(parquet: pq.ParquetFile, group: int, names: tuple[str, ...]) -> int:
    """Bytes of these columns in a row group, as its footer tells; of all columns where they fit the cache anyway."""
    metadata = parquet.metadata.row_group(group)
    if metadata.total_byte_size <= CACHED_GROUP_BYTES:
        return int(metadata.total_byte_size)
    paths = (parquet.schema.column(i).path for i in range(metadata.num_columns))
    wanted = (metadata.column(i) for i, path in enumerate(paths) if _is_of(path, names))
    return sum(column.total_uncompressed_size for column in wanted)


def _is_of(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)
