"""How a csv, tsv or txt file is written, found out from its start: encoding, delimiter, header."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from datapipe.sources.columns import Columns, columns_of_table, is_url, listed
from datapipe.sources.input_files import InputFile
from datapipe.sources.row_index import DamagedError
from datapipe.sources.settings import SourceSettings
from subject_diffusion.errors import SourceError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
"""What the name promises. Another one is taken only where this one makes no header of it."""
OTHER_DELIMITERS = ("\t", ",", ";", "|")

HEAD_BYTES = 1 << 20
HEAD_LINES = 100

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # which begins with UTF-16's
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Dialect:
    """`newline`: what ends a line; `pads`: cells begin with blanks that are none of theirs; `names`: of the columns;
    `url`: the place of the URL, or of the path, among them."""

    encoding: str
    newline: str
    delimiter: str
    pads: bool
    names: tuple[str, ...]
    has_header: bool
    columns: Columns
    place: int


def encoding_of(head: bytes, file: InputFile, settings: SourceSettings) -> str:
    """By the setting, a byte order mark, or what UTF-16 leaves in Latin text. Raises DamagedError, SourceError."""
    if settings.encoding is not None:
        try:
            return codecs.lookup(settings.encoding).name
        except LookupError:
            raise SourceError(
                f"source.encoding: no encoding {settings.encoding}; use a name of Python's, such as latin-1 or cp1251"
            ) from None
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if head[offset::2].count(0) > 0.4 * len(head) / 2 > head[1 - offset :: 2].count(0):
            return encoding
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        line = head[: error.start].count(b"\n") + 1
        raise DamagedError(
            f"input {file.url}: not UTF-8 (byte 0x{head[error.start]:02x} in line {line}); set source.encoding to what "
            "it is in, such as latin-1 (Western Europe), cp1251 (Cyrillic) or gb18030 (Chinese)"
        ) from None
    return "utf-8"


def dialect_of(table: IO[bytes], file: InputFile, settings: SourceSettings) -> Dialect | None:
    """Looks at the start of a table, and goes back there; None for an empty one. Raises DamagedError."""
    head = table.read(HEAD_BYTES)
    table.seek(0)
    encoding = encoding_of(head, file, settings)
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    newline = "\r" if "\r" in text and "\n" not in text else "\n"
    lines = [line.rstrip("\r") for line in text.split(newline) if line.strip()][:HEAD_LINES]
    if not lines:
        return None
    delimiter = _delimiter(lines[0], file, settings)
    first = split_plainly(lines[0], delimiter)
    pads = f"{delimiter} " in lines[0]
    names, has_header = _names(first, len(lines), file, settings)
    columns = columns_of_table(names, settings, file.url)
    place = names.index(columns.url or columns.image or "")
    return Dialect(encoding, newline, delimiter, pads, tuple(names), has_header, columns, place)


def split_plainly(line: str, delimiter: str) -> list[str]:
    """The cells of a line; quotation marks around a whole cell are taken off."""
    cell = re.compile(rf'[ ]*"((?:[^"]|"")*)"[ ]*(?={re.escape(delimiter)}|$)|([^{re.escape(delimiter)}]*)')
    cells, at = [], 0
    while True:
        match = cell.match(line, at)
        assert match is not None  # the second alternative matches anything
        quoted = match.group(1)
        cells.append(match.group(2) if quoted is None else quoted.replace('""', '"'))
        at = match.end() + 1
        if at > len(line):
            return cells


def _delimiter(first: str, file: InputFile, settings: SourceSettings) -> str:
    promised = DELIMITERS[file.suffix]
    candidates = [promised, *(d for d in OTHER_DELIMITERS if d != promised)]
    cells = {delimiter: split_plainly(first, delimiter) for delimiter in candidates}
    if settings.columns:
        return next((d for d in candidates if len(cells[d]) == len(settings.columns)), promised)
    for delimiter in candidates:
        if any(is_url(cell) for cell in cells[delimiter]) or _has_place(cells[delimiter], settings):
            return delimiter
    return max(candidates, key=lambda d: len(cells[d]))


def _has_place(names: Sequence[str], settings: SourceSettings) -> bool:
    try:
        columns_of_table([name.strip() for name in names], settings, "")
    except DamagedError:
        return False
    return True


def _names(first: Sequence[str], lines: int, file: InputFile, settings: SourceSettings) -> tuple[list[str], bool]:
    """The columns' names, and whether the first row is them."""
    if settings.columns:
        if len(first) != len(settings.columns):
            raise DamagedError(
                f"input {file.url}: its first row has {len(first)} cells ({listed(first)}), and source.columns names "
                f"{len(settings.columns)}; name every column, in order"
            )
        return list(settings.columns), False
    # No column is named so, not even where a blank makes no URL of it.
    urls = [
        n for n, cell in enumerate(first) if is_url(cell) or cell.startswith(("http://", "https://", "s3://", "gs://"))
    ]
    if not urls:
        return [name.strip() for name in first], True
    if len(first) == 1:
        return ["url"], False
    if len(first) == 2 and len(urls) == 1:
        return ["url", "caption"] if urls == [0] else ["caption", "url"], False
    longest = max((n for n in range(len(first)) if n not in urls), key=lambda n: len(first[n]), default=-1)
    roles = {urls[0]: "url", longest: "caption"}
    guess = ",".join(roles.get(n, f"column{n}") for n in range(len(first)))
    raise DamagedError(
        f"input {file.url}: its first row ({listed(first)}) is no header; name the columns in order, for instance "
        f"source.columns=[{guess}]"
    )
