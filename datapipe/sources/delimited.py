"""csv, tsv and txt as people write them. No row is ever swallowed by a quotation mark that nobody closed."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO

from datapipe.sources.columns import is_place, row_of
from datapipe.sources.dialect import HEAD_LINES, Dialect, dialect_of
from datapipe.sources.input_files import InputFile
from datapipe.sources.kinds import counted
from datapipe.sources.row_index import DamagedError, Found, InputRow
from datapipe.sources.settings import SourceSettings

LINE_LIMIT = 16 << 20
"""Characters. A longer line is no row of a table, and fails."""

LINES_OF_ONE_ROW = 1000
"""A cell in quotation marks spans no more lines than this."""

_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_UNDECODED = re.compile("[\udc80-\udcff]")

Cells = list[str]
Line = tuple[int, str | None]
"""Its number from 1, and its text with what ends it; None for one over LINE_LIMIT."""


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
        if cells is None:
            yield InputRow.lost(
                f"{where}: longer than {LINE_LIMIT >> 20} million characters; mend it, or save the table as parquet"
            )
        elif any(_UNDECODED.search(cell) for cell in cells if not cell.isascii()):
            yield InputRow.lost(f"{where}: not in {dialect.encoding}; mend it, or set source.encoding")
        elif len(cells) != len(dialect.names):
            yield InputRow.lost(
                f"{where}: {counted(len(cells), 'cell')} in place of {len(dialect.names)}; mend the line"
            )
        else:
            yield row_of(dict(zip(dialect.names, cells, strict=True)), dialect.columns, settings, file.folder)


def _lines(table: IO[bytes], dialect: Dialect, file: InputFile) -> Iterator[Line]:
    """Every line. Of one that is too long, no more than LINE_LIMIT is held. Raises DamagedError."""
    errors = "strict" if dialect.encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    text = io.TextIOWrapper(table, dialect.encoding, errors, newline=dialect.newline)
    number = 0
    try:
        while line := text.readline(LINE_LIMIT):
            number += 1
            if len(line) < LINE_LIMIT or line.endswith(dialect.newline):
                yield number, line
                continue
            while (rest := text.readline(LINE_LIMIT)) and not rest.endswith(dialect.newline):
                pass
            yield number, None
    except UnicodeDecodeError:
        raise DamagedError(
            f"input {file.url}: line {number + 1} is not in {dialect.encoding}; set source.encoding to what it is in"
        ) from None
    finally:
        text.detach()  # else it closes the file, which is someone else's


class _Records:
    """Lines become rows of cells, (number of the first line, cells); None for cells of a line that is too long."""

    def __init__(self, lines: Iterator[Line], dialect: Dialect, *, quotes: bool) -> None:
        self._lines, self._dialect, self._quotes = lines, dialect, quotes
        self._waiting: deque[Line] = deque()
        self._width = len(dialect.names)
        self._readings = (_Reading(dialect, doubled=True), _Reading(dialect, doubled=False))
        self._quoted = self._stray = 0
        """Lines so far in which quotation marks hold delimiters, and in which they are text."""

    def __iter__(self) -> Iterator[tuple[int, Cells | None]]:
        return self

    def __next__(self) -> tuple[int, Cells | None]:
        while True:
            number, line = self._next_line()
            if line is None:
                return number, None
            text = self._without_end(line)
            if text.strip() or self._dialect.delimiter in text:
                return number, self._cells(line, text)

    def _cells(self, line: str, text: str) -> Cells:
        plain = self._fitting(self._plain(text))
        if not self._quotes or '"' not in text:
            return plain
        read = [reading(text) for reading in self._readings]
        for cells, is_open in read:
            if len(cells) == self._width and not is_open:
                self._quoted += len(plain) != self._width
                self._stray += cells == plain
                return cells
        unclosed = [reading for reading, (_, is_open) in zip(self._readings, read, strict=True) if is_open]
        if (joined := self._continued(line, unclosed)) is not None:
            return joined
        self._stray += 1
        return plain if len(plain) == self._width else self._fitting(read[0][0])

    def _continued(self, line: str, readings: Sequence[_Reading]) -> Cells | None:
        """The row that begins with this line and ends where its quotation mark is closed; None if it never is.

        A mark at the end of a line that is a row by itself closes nothing (`12"`), unless the lines before have shown
        that the file knows quoting.
        """
        taken: list[Line] = []
        cells = self._closed(line, list(readings), taken)
        if cells is not None:
            closing = self._without_end(taken[-1][1] or "")
            if self._quoted > self._stray or not self._is_row(closing):
                return cells
        self._waiting.extendleft(reversed(taken))
        return None

    def _closed(self, line: str, readings: list[_Reading], taken: list[Line]) -> Cells | None:
        """The row that begins with this line and fits one of the readings; the lines that it goes on in are added to
        `taken`. By each reading, there is one line at most that can close it: the first with an odd mark."""
        while readings and len(taken) < LINES_OF_ONE_ROW and len(line) < LINE_LIMIT:
            try:
                taken.append(self._next_line())
            except StopIteration:
                return None
            following = taken[-1][1]
            if following is None:
                return None
            line += following
            for reading in [reading for reading in readings if reading.marks(following) % 2]:
                readings.remove(reading)
                cells, is_open = reading(self._without_end(line))
                if len(cells) == self._width and not is_open:
                    return cells
        return None

    def _is_row(self, text: str) -> bool:
        candidates = (self._plain(text), self._readings[0](text)[0])
        return any(len(c) >= self._width and is_place(c[self._dialect.place]) for c in candidates)

    def _next_line(self) -> Line:
        return self._waiting.popleft() if self._waiting else next(self._lines)

    def _without_end(self, line: str) -> str:
        return line.removesuffix(self._dialect.newline).removesuffix("\r")

    def _plain(self, text: str) -> Cells:
        cells = text.split(self._dialect.delimiter)
        return [cell.lstrip(" ") for cell in cells] if self._dialect.pads else cells

    def _fitting(self, cells: Cells) -> Cells:
        """Without empty cells beyond the last column, which spreadsheets leave."""
        return cells[: self._width] if not any(cells[self._width :]) else cells


class _Reading:
    """Splits a line as the quotation marks say. `doubled`: a mark inside a cell is written twice, as RFC 4180 has it;
    else it follows a backslash."""

    def __init__(self, dialect: Dialect, *, doubled: bool) -> None:
        end = f"(?={re.escape(dialect.delimiter)}|\\Z)"
        inside = r'[^"]|""' if doubled else r'[^"\\]|\\.'
        blanks = "[ ]*" if dialect.pads else ""
        pattern = f'{blanks}"((?>(?:{inside})*))"{end}|{blanks}([^{re.escape(dialect.delimiter)}]*)'
        self._cell = re.compile(pattern, re.DOTALL)
        self._doubled, self._newline = doubled, dialect.newline

    def __call__(self, text: str) -> tuple[Cells, bool]:
        """The cells, and whether a quotation mark that begins one of them may be closed on a later line only."""
        cells, at, is_open = [], 0, False
        while True:
            match = self._cell.match(text, at)
            assert match is not None  # the second alternative matches anything
            quoted, plain = match.groups()
            if quoted is None:
                cells.append(plain)
                # Only within quotation marks does a cell go on in another line.
                is_open |= self._newline in plain or (plain.startswith('"') and self.marks(plain) % 2 == 1)
            else:
                cells.append(quoted.replace('""', '"') if self._doubled else _ESCAPED.sub(r"\1", quoted))
            at = match.end() + 1
            if at > len(text):
                return cells, is_open

    def marks(self, text: str) -> int:
        """How many quotation marks open or close something; a doubled one does both."""
        return (text if self._doubled else _ESCAPED.sub("", text)).count('"')
