"""JSON of any length, one element of its lists at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from datapipe.sources.row_index import DamagedError
from subject_diffusion.errors import one_line

CHUNK = 1 << 20
RECORD_LIMIT = 64 << 20
"""Characters of one element."""

_BLANK = re.compile(r"[\s\ufeff]*")
_BETWEEN = re.compile(r"[\s\ufeff,]*")
_NEAR_END = 16
"""Where an element ends early, the decoder complains about its last token, which may be `\ud83d\ude00`."""


@dataclass(frozen=True)
class JsonText:
    """A file's text, by chunks, from its start as often as it is asked for. `where`: what to call the file in an error;
    `advice`: what to do if it is not in its encoding."""

    file: IO[bytes]
    encoding: str
    where: str
    advice: str

    def chunks(self) -> Iterator[str]:
        """Raises DamagedError."""
        self.file.seek(0)
        decoder = codecs.getincrementaldecoder(self.encoding)()
        try:
            while chunk := self.file.read(CHUNK):
                if text := decoder.decode(chunk):
                    yield text
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DamagedError(f"{self.where}: not {self.encoding} ({one_line(error)}); {self.advice}") from None


class JsonReader:
    """A position in a text of which more comes when it is needed."""

    def __init__(self, text: JsonText) -> None:
        self._chunks = text.chunks()
        self._decoder = json.JSONDecoder()
        self.buffer, self.at = "", 0

    def skip(self, pattern: re.Pattern[str] = _BLANK) -> str:
        """Goes past what the pattern matches, which may be nothing; the next character, "" at the end."""
        while True:
            self.at = pattern.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # all match the empty string
            if self.at < len(self.buffer) or not self._more():
                return self.buffer[self.at : self.at + 1]

    def value(self) -> Any:
        """The next value. Raises ValueError where it is none, RecursionError where it is nested too deep."""
        while True:
            start = self.at
            try:
                value, end = self._decoder.raw_decode(self.buffer, start)
                if end < len(self.buffer) or not self._more():  # else a number may go on
                    self.at += end - start
                    return value
            except json.JSONDecodeError as error:
                early = error.pos > len(self.buffer) - _NEAR_END or error.msg.startswith("Unterminated string")
                if not early or len(self.buffer) - self.at > RECORD_LIMIT or not self._more():
                    raise

    def listed(self) -> Iterator[Any]:
        """The elements of the list that begins here. Raises as `value` does."""
        self.at += 1
        while (following := self.skip(_BETWEEN)) != "]":
            if not following:
                raise ValueError("it ends early")
            yield self.value()
        self.at += 1

    def next_line(self) -> bool:
        """Goes behind the next line break; False if there is none."""
        while (end := self.buffer.find("\n", self.at)) < 0:
            self.at = len(self.buffer)
            if not self._more():
                return False
        self.at = end + 1
        return True

    def _more(self) -> bool:
        """Reads on: at least as much as is held, so that a long element is not parsed too often."""
        held = len(self.buffer) - self.at
        parts = [self.buffer[self.at :]]
        while (chunk := next(self._chunks, "")) and sum(map(len, parts)) < 2 * held:
            parts.append(chunk)
        parts.append(chunk)
        self.buffer, self.at = "".join(parts), 0
        return len(self.buffer) > held


def elements(text: JsonText) -> Iterator[tuple[str, Any]]:
    """(name of the list, element) of every element of the lists in an object, or of a list, whose name is "". Raises
    DamagedError."""
    reader = JsonReader(text)
    name = ""
    try:
        if reader.skip() == "[":
            yield from (("", element) for element in reader.listed())
        elif reader.skip() != "{":
            raise ValueError("neither an object nor a list")
        else:
            reader.at += 1
            while reader.skip(_BETWEEN) == '"':
                name = reader.value()
                reader.skip(re.compile(r"[\s:]*"))
                if reader.skip() == "[":
                    yield from ((name, element) for element in reader.listed())
                else:
                    reader.value()
            if reader.skip() != "}":
                raise ValueError("it ends early")
            reader.at += 1
        if reader.skip():
            raise ValueError("more follows where it should end")
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{text.where}: not valid JSON within {name or 'its start'} ({one_line(error)}); mend it or write it again"
        ) from None
