"""JSON lines, arrays of objects, and objects that wrap one, read without ever holding much more than one chunk."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from datapipe.sources.columns import columns_of_keys, columns_of_table, row_of
from datapipe.sources.dialect import encoding_of
from datapipe.sources.input_files import InputFile
from datapipe.sources.row_index import DamagedError, Found, InputRow
from datapipe.sources.settings import SourceSettings
from datapipe.sources.values import value_at
from subject_diffusion.errors import one_line

CHUNK = 1 << 20
RECORD_LIMIT = 64 << 20
"""Characters of one record."""
KEYS_FROM = 1000
"""Records whose keys are looked at to tell whether this is a table of images. Every record's own keys are read."""

MOST_KEYS = 10_000
"""Different sets of keys that are kept, to say what was recognized."""

_BETWEEN_OBJECTS = re.compile(r"[\s,\[\]\ufeff]*")
"""An array's brackets and commas say nothing that its objects do not."""
_WRAPPING = re.compile(r'\s*\{.*?"[^"\\]*"\s*:\s*\[\s*\{', re.DOTALL)
"""The start of an object that holds a list of objects."""
_NEAR_END = 16
"""Where a record ends early, the decoder complains about its last token, which may be `\ud83d\ude00`."""

Record = dict[str, Any]


def read_json(table: IO[bytes], file: InputFile, settings: SourceSettings, found: Found) -> Iterator[InputRow]:
    """Every row of a JSON table. A record that cannot be read is a row with a problem."""
    text = _Text(table, file, settings)
    wrapped = _lists_of(text)
    records = _wrapped_records(text, wrapped, settings) if wrapped else _records(text)
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


class _Text:
    """A file's text, by chunks, from its start as often as it is asked for."""

    def __init__(self, table: IO[bytes], file: InputFile, settings: SourceSettings) -> None:
        self._table, self.file = table, file
        self._encoding = encoding_of(table.read(CHUNK), file, settings)

    def chunks(self) -> Iterator[str]:
        self._table.seek(0)
        decoder = codecs.getincrementaldecoder(self._encoding)()
        try:
            while chunk := self._table.read(CHUNK):
                if text := decoder.decode(chunk):
                    yield text
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DamagedError(
                f"input {self.file.url}: not {self._encoding} ({one_line(error)}); set source.encoding to what it is in"
            ) from None


class _Reader:
    """A position in a text of which more comes when it is needed."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._decoder = json.JSONDecoder()
        self.buffer, self.at = "", 0

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Goes past what the pattern matches, which may be nothing; the next character, "" at the end."""
        while True:
            self.at = pattern.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # all match the empty string
            if self.at < len(self.buffer) or not self.more():
                return self.buffer[self.at : self.at + 1]

    def more(self) -> bool:
        """Reads on: at least as much as is held, so that a long record is not parsed too often."""
        held = len(self.buffer) - self.at
        parts = [self.buffer[self.at :]]
        while (chunk := next(self._chunks, "")) and sum(map(len, parts)) < 2 * held:
            parts.append(chunk)
        parts.append(chunk)
        self.buffer, self.at = "".join(parts), 0
        return len(self.buffer) > held

    def value(self) -> Any:
        """The next value. Raises ValueError where it is none, RecursionError where it is nested too deep."""
        while True:
            try:
                value, self.at = self._decoder.raw_decode(self.buffer, self.at)
                return value
            except json.JSONDecodeError as error:
                early = error.pos > len(self.buffer) - _NEAR_END or error.msg.startswith("Unterminated string")
                if not early or len(self.buffer) - self.at > RECORD_LIMIT or not self.more():
                    raise

    def next_line(self) -> bool:
        """Goes behind the next line break; False if there is none."""
        while (end := self.buffer.find("\n", self.at)) < 0:
            self.at = len(self.buffer)
            if not self.more():
                return False
        self.at = end + 1
        return True


def _records(text: _Text) -> Iterator[Record | InputRow]:
    """The objects of an array or of lines; of a line that is none, a row with a problem."""
    reader = _Reader(text.chunks())
    is_array = reader.skip(re.compile(r"[\s\ufeff]*")) == "["
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
            yield InputRow.lost(f"{text.file.name}: {problem}{rest}; mend it, or save the table as parquet")
            if is_array or not reader.next_line():
                return
        row += 1


def _lists_of(text: _Text) -> dict[str, Record]:
    """If the file is one object that wraps lists of objects: the first element of each list, by name."""
    reader = _Reader(text.chunks())
    if reader.skip(re.compile(r"[\s\ufeff]*")) != "{":
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
    for name, element in _elements(text):
        lists.setdefault(name, element)
    return lists


def _is_row(record: Record) -> bool:
    columns = columns_of_keys(tuple(_paths(record)), SourceSettings())
    return any(isinstance(value_at(record, column), str) for column in (columns.url, columns.image) if column)


def _elements(text: _Text, keep: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Record]]:
    """(name of the list, object) of every object in the lists of a wrapping object. Raises DamagedError."""
    reader = _Reader(text.chunks())
    blank = re.compile(r"[\s\ufeff,]*")
    name = ""
    try:
        reader.skip(blank)
        reader.at += 1  # the brace
        while reader.skip(blank) == '"':
            name = reader.value()
            reader.skip(re.compile(r"[\s:]*"))
            if reader.buffer[reader.at] != "[":
                reader.value()
                continue
            reader.at += 1
            while reader.skip(blank) not in ("]", ""):
                element = reader.value()
                if keep(name) and isinstance(element, dict):
                    yield name, element
            reader.at += 1
        if reader.skip(blank) != "}":
            raise ValueError("it ends early")
        reader.at += 1
        if reader.skip(blank):
            raise ValueError("more follows where it should end")
    except (ValueError, IndexError, RecursionError) as error:
        raise DamagedError(
            f"input {text.file.url}: not valid JSON within {name or 'its start'} ({one_line(error)}); mend it, or save "
            "the table as parquet"
        ) from None


def _wrapped_records(text: _Text, lists: dict[str, Record], settings: SourceSettings) -> Iterator[Record]:
    """The records of the list that is a table of images. COCO's captions, a list of their own, are joined to it."""
    chosen = next((n for n in ("images", *lists) if n in lists and _is_table(lists[n], settings)), next(iter(lists)))
    captions: dict[Any, str] = {}  # The first of each image: the join has to hold one text an image.
    if chosen != "annotations" and {"image_id", "caption"} <= lists.get("annotations", {}).keys():
        for _, annotation in _elements(text, lambda name: name == "annotations"):
            if isinstance(annotation.get("image_id"), (int, str)):
                captions.setdefault(annotation["image_id"], annotation.get("caption", ""))
    for _, record in _elements(text, lambda name: name == chosen):
        if captions:
            record.setdefault("caption", captions.get(record.get("id"), ""))
        yield record


def _is_table(record: Record, settings: SourceSettings) -> bool:
    columns = columns_of_keys(tuple(_paths(record)), settings)
    return columns.url is not None or columns.image is not None
