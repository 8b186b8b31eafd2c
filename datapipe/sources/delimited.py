"""csv, tsv and txt as people write them. No row is ever swallowed by a quotation mark that nobody closed."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO

from datapipe.sources.columns import is_place, row_of
from datapipe.sources.dialect import HEAD_LINES, Dialect, dialect_of
from datapipe.sources.input_files import InputFile
from datapipe.sources.kinds import counted
from datapipe.sources.row_index import DamagedError, Found, InputRow
from datapipe.sources.settings import SourceSettings

LINE_LIMIT = 16 << 20
"""Characters. A longer line is no row of a table."""

LINES_OF_ONE_ROW = 1000
"""A cell in quotation marks spans no more lines than this."""

_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_UNDECODED = re.compile("[\udc80-\udcff]")

Cells = list[str]
Reading = Callable[[str], tuple[Cells, bool]]
"""A line's cells, and whether a quotation mark that begins one of them may be closed on a later line only."""


def read_delimited(table: IO[bytes], file: InputFile, settings: SourceSettings, found: Found) -> Iterator[InputRow]:
    """Every row of a table. One that cannot be read is a row with a problem, which names its line."""
    dialect = dialect_of(table, file, settings)
    if dialect is None:
        return
    found.words = found.words or dialect.columns.described(len(dialect.names))
    head: list[InputRow] = []
    rows = _rows(table, dialect, file, settings)
    for row in rows:
        head.append(row)
        if len(head) == HEAD_LINES:
            break
    lost = [row.problem for row in head if row.problem]
    if len(lost) > 1 and 2 * len(lost) > len(head):
        raise DamagedError(
            f"input {file.url}: {len(lost)} of its first {len(head)} rows cannot be read ({lost[0]}); mend it, set "
            "source.quoting=none if its quotation marks are text, or save the table as parquet"
        )
    yield from head
    yield from rows


def _rows(table: IO[bytes], dialect: Dialect, file: InputFile, settings: SourceSettings) -> Iterator[InputRow]:
    records = _Records(_lines(table, dialect, file), dialect, quotes=settings.quoting == "auto")
    if dialect.has_header:
        next(records, None)
    for line, cells in records:
        where = f"{file.name} line {line}"
        if any(_UNDECODED.search(cell) for cell in cells if not cell.isascii()):
            yield InputRow.lost(f"{where}: not in {dialect.encoding}; mend it, or set source.encoding")
        elif len(cells) != len(dialect.names):
            yield InputRow.lost(
                f"{where}: {counted(len(cells), 'cell')} in place of {len(dialect.names)}; mend the line"
            )
        else:
            yield row_of(dict(zip(dialect.names, cells, strict=True)), dialect.columns, settings, file.folder)


def _lines(table: IO[bytes], dialect: Dialect, file: InputFile) -> Iterator[tuple[int, str]]:
    """(number from 1, text with what ends it) of every line."""
    errors = "strict" if dialect.encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    text = io.TextIOWrapper(table, dialect.encoding, errors, newline=dialect.newline)
    number = 0
    try:
        while line := text.readline(LINE_LIMIT):
            number += 1
            if len(line) == LINE_LIMIT:
                raise DamagedError(
                    f"input {file.url}: line {number} is longer than {LINE_LIMIT >> 20} million characters; is it the "
                    "right file? Check the path"
                )
            yield number, line
    except UnicodeDecodeError:
        raise DamagedError(
            f"input {file.url}: line {number + 1} is not in {dialect.encoding}; set source.encoding to what it is in"
        ) from None
    finally:
        text.detach()  # else it closes the file, which is someone else's


class _Records:
    """Lines become rows of cells, (number of the first line, cells)."""

    def __init__(self, lines: Iterator[tuple[int, str]], dialect: Dialect, *, quotes: bool) -> None:
        self._lines, self._dialect, self._quotes = lines, dialect, quotes
        self._waiting: deque[tuple[int, str]] = deque()
        self._width = len(dialect.names)
        self._readings = (_reading(dialect, doubled=True), _reading(dialect, doubled=False))

    def __iter__(self) -> Iterator[tuple[int, Cells]]:
        return self

    def __next__(self) -> tuple[int, Cells]:
        while True:
            number, line = self._next_line()
            text = self._without_end(line)
            if text.strip() or self._dialect.delimiter in text:
                return number, self._cells(line, text)

    def _cells(self, line: str, text: str) -> Cells:
        if not self._quotes or '"' not in text:
            return self._fitting(self._plain(text))
        strict, is_open = self._readings[0](text)
        for cells, still_open in ((strict, is_open), self._readings[1](text)):
            if len(cells) == self._width and not still_open:
                return cells
        if is_open and (joined := self._continued(line)) is not None:
            return joined
        plain = self._fitting(self._plain(text))
        return plain if len(plain) == self._width else self._fitting(strict)

    def _continued(self, line: str) -> Cells | None:
        """The row that begins with this line and ends where its quotation mark is closed; None if it never is, or not
        before a line that is a row by itself."""
        taken: list[tuple[int, str]] = []
        while len(taken) < LINES_OF_ONE_ROW and len(line) < LINE_LIMIT:
            try:
                taken.append(self._next_line())
            except StopIteration:
                break
            following = self._without_end(taken[-1][1])
            if self._is_row(following):
                break
            line += taken[-1][1]
            if '"' not in following:
                continue
            for cells, still_open in (reading(self._without_end(line)) for reading in self._readings):
                if len(cells) == self._width and not still_open:
                    return cells
        self._waiting.extendleft(reversed(taken))
        return None

    def _is_row(self, text: str) -> bool:
        candidates = (self._plain(text), self._readings[0](text)[0])
        return any(len(c) == self._width and is_place(c[self._dialect.place]) for c in candidates)

    def _next_line(self) -> tuple[int, str]:
        return self._waiting.popleft() if self._waiting else next(self._lines)

    def _without_end(self, line: str) -> str:
        return line.removesuffix(self._dialect.newline).removesuffix("\r")

    def _plain(self, text: str) -> Cells:
        cells = text.split(self._dialect.delimiter)
        return [cell.lstrip(" ") for cell in cells] if self._dialect.pads else cells

    def _fitting(self, cells: Cells) -> Cells:
        """Without empty cells beyond the last column, which spreadsheets leave."""
        return cells[: self._width] if not any(cells[self._width :]) else cells


def _reading(dialect: Dialect, *, doubled: bool) -> Reading:
    """Splits a line as the quotation marks say. `doubled`: a mark inside a cell is written twice, as RFC 4180 has it;
    else it follows a backslash."""
    end = f"(?={re.escape(dialect.delimiter)}|\\Z)"
    inside = r'[^"]|""' if doubled else r'[^"\\]|\\.'
    blanks = "[ ]*" if dialect.pads else ""
    pattern = f'{blanks}"((?>(?:{inside})*))"{end}|{blanks}([^{re.escape(dialect.delimiter)}]*)'
    cell = re.compile(pattern, re.DOTALL)

    def read(text: str) -> tuple[Cells, bool]:
        cells, at, is_open = [], 0, False
        while True:
            match = cell.match(text, at)
            assert match is not None  # the second alternative matches anything
            quoted, plain = match.groups()
            if quoted is None:
                cells.append(plain)
                is_open |= plain.startswith('"') and plain.count('"') % 2 == 1
            else:
                cells.append(quoted.replace('""', '"') if doubled else _ESCAPED.sub(r"\1", quoted))
            at = match.end() + 1
            if at > len(text):
                return cells, is_open

    return read
