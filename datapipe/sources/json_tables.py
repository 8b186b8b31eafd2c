"""JSON lines, arrays of objects, and objects that wrap one, whose records become rows one at a time."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from datapipe.sources.columns import columns_of_keys, columns_of_table, row_of
from datapipe.sources.dialect import encoding_of
from datapipe.sources.input_files import InputFile
from datapipe.sources.json_stream import CHUNK, JsonReader, JsonText, elements
from datapipe.sources.row_index import DamagedError, Found, InputRow
from datapipe.sources.settings import SourceSettings
from datapipe.sources.temporary_database import temporary_database
from datapipe.sources.values import value_at
from subject_diffusion.errors import one_line

KEYS_FROM = 1000
"""Records whose keys are looked at to tell whether this is a table of images. Every record's own keys are read."""

MOST_KEYS = 10_000
"""Different sets of keys that are kept, to say what was recognized."""

_BETWEEN_OBJECTS = re.compile(r"[\s,\[\]\ufeff]*")
"""An array's brackets and commas say nothing that its objects do not."""
_WRAPPING = re.compile(r'\s*\{.*?"[^"\\]*"\s*:\s*\[\s*\{', re.DOTALL)
"""The start of an object that holds a list of objects."""

Record = dict[str, Any]


def read_json(table: IO[bytes], file: InputFile, settings: SourceSettings, found: Found) -> Iterator[InputRow]:
    """Every row of a JSON table. A record that cannot be read is a row with a problem."""
    encoding = encoding_of(table.read(CHUNK), file, settings)
    text = JsonText(table, encoding, f"input {file.url}", "set source.encoding to what it is in")
    wrapped = _lists_of(text)
    records = _wrapped_records(text, wrapped, settings) if wrapped else _records(text, file)
    head = list(itertools.islice(records, KEYS_FROM))
    seen = _Keys(file, settings)
    for record in head:
        if isinstance(record, dict):
            seen.add(record)
    if seen.names:
        columns_of_table(list(seen.names.values()), settings, file.url)
    for number, record in enumerate(itertools.chain(head, records)):
        if isinstance(record, InputRow):
            yield record
            continue
        try:
            keys = seen.add(record)
        except DamagedError as error:  # further down than the start, which decides for the whole file
            yield InputRow.lost(error.about(file.url, file.name))
            continue
        yield _row(record, keys, number, file, settings)
    if seen.names and not found.words:
        found.words = seen.described()


class _Keys:
    """The keys of all records, some of which may have others than their neighbors. `names`: as first spelled, by lower
    case; `lists`: those that held several texts."""

    def __init__(self, file: InputFile, settings: SourceSettings) -> None:
        self._file, self._settings = file, settings
        self._known: set[tuple[str, ...]] = set()
        self.names: dict[str, str] = {}
        self.lists: set[str] = set()

    def add(self, record: Record) -> tuple[str, ...]:
        """The record's own keys. Raises DamagedError for one that has the same key in two spellings, of which one
        should be named."""
        keys = tuple(_paths(record))
        if keys not in self._known and len(self._known) < MOST_KEYS:
            self._known.add(keys)
            self.lists |= {key for key in keys if isinstance(value_at(record, key), (list, dict))}
            if len({key.lower() for key in keys}) < len(keys):
                columns_of_table(keys, self._settings, self._file.url)
            for key in keys:
                self.names.setdefault(key.lower(), key)
        return keys

    def described(self) -> str:
        names = list(self.names.values())
        columns = columns_of_table(names, self._settings, self._file.url)
        top = [name for name in names if "." not in name]
        return columns.described(len(top), self.lists, self._settings.alt_text_choice)


def _row(record: Record, keys: tuple[str, ...], number: int, file: InputFile, settings: SourceSettings) -> InputRow:
    columns = columns_of_keys(keys, settings)
    if isinstance(value_at(record, columns.url), dict):
        return InputRow.lost(
            f"{file.name}: the {columns.url} of row {number} is no text; expected one object per row (pandas: "
            "to_json(orient='records', lines=True))"
        )
    return row_of(record, columns, settings, file.folder)


def _paths(record: Record, prefix: str = "", depth: int = 3) -> Iterator[str]:
    """The keys of an object, and those of objects in it after a dot, `depth` deep."""
    for key, value in record.items():
        yield prefix + key
        if isinstance(value, dict) and depth > 1:
            yield from _paths(value, f"{prefix}{key}.", depth - 1)


def _records(text: JsonText, file: InputFile) -> Iterator[Record | InputRow]:
    """The objects of an array or of lines; of a line that is none, a row with a problem."""
    reader = JsonReader(text)
    is_array = reader.skip() == "["
    row = 0
    while reader.skip(_BETWEEN_OBJECTS):
        problem = ""
        try:
            record = reader.value()
            if isinstance(record, dict):
                yield record
            else:
                problem = f"row {row} is {type(record).__name__} and no object"
        except (ValueError, RecursionError) as error:
            problem = f"row {row} is not valid JSON ({one_line(error)})"
        if problem:
            rest = ", and no row after it can be found" if is_array else ""
            yield InputRow.lost(f"{file.name}: {problem}{rest}; mend it, or save the table as parquet")
            if is_array or not reader.next_line():
                return
        row += 1


def _lists_of(text: JsonText) -> dict[str, Record]:
    """If the file is one object that wraps lists of objects: the first element of each list, by name."""
    reader = JsonReader(text)
    if reader.skip() != "{":
        return {}
    start = reader.buffer[reader.at : reader.at + CHUNK]
    if not _WRAPPING.match(start):
        return {}
    try:
        first, end = json.JSONDecoder().raw_decode(start)
        # Of JSON lines, the first is a row like any other, whatever it holds.
        if start[end:].strip() or _is_row(first):
            return {}
    except ValueError:  # longer than this, as a line hardly is
        pass
    lists: dict[str, Record] = {}
    for name, element in elements(text):
        if isinstance(element, dict):
            lists.setdefault(name, element)
    return lists


def _is_row(record: Record) -> bool:
    columns = columns_of_keys(tuple(_paths(record)), SourceSettings())
    return any(isinstance(value_at(record, column), str) for column in (columns.url, columns.image) if column)


def _wrapped_records(text: JsonText, lists: dict[str, Record], settings: SourceSettings) -> Iterator[Record]:
    """The records of the list that is a table of images. COCO's captions, a list of their own, are joined to it."""
    chosen = next((n for n in ("images", *lists) if n in lists and _is_table(lists[n], settings)), next(iter(lists)))
    with_captions = chosen != "annotations" and {"image_id", "caption"} <= lists.get("annotations", {}).keys()
    with temporary_database() as captions:
        # The first of each image: the join has to hold one text an image. Ids are compared as JSON, where 7 is not "7".
        captions.execute("CREATE TABLE captions (image TEXT PRIMARY KEY, caption TEXT) WITHOUT ROWID")
        for name, told in elements(text) if with_captions else ():
            if name == "annotations" and isinstance(told, dict) and isinstance(told.get("image_id"), (int, str)):
                found = (json.dumps(told["image_id"]), json.dumps(told.get("caption", "")))
                captions.execute("INSERT OR IGNORE INTO captions VALUES (?, ?)", found)
        for name, record in elements(text):
            if name != chosen or not isinstance(record, dict):
                continue
            if with_captions:
                query = "SELECT caption FROM captions WHERE image = ?"
                caption = captions.execute(query, (json.dumps(record.get("id")),)).fetchone()
                record.setdefault("caption", json.loads(caption[0]) if caption else "")
            yield record


def _is_table(record: Record, settings: SourceSettings) -> bool:
    columns = columns_of_keys(tuple(_paths(record)), settings)
    return columns.url is not None or columns.image is not None
