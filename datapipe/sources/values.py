"""What a cell of somebody's table says, whatever its type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TEXT_KEYS = ("caption", "text", "raw", "value", "url", "src")
"""Where the text is in an object that wraps it, as in `{"raw": "a cat", "sentid": 7}`."""


def text_of(value: Any, choice: int | str | None = None) -> str:
    """The cell's text; of a list or of texts by language, the one chosen or, where there is none, the first that says
    anything."""
    if isinstance(value, (list, tuple, Mapping)):
        texts = _several(value)
        if isinstance(choice, int) and 0 <= choice < len(texts) and texts[choice][1]:
            return texts[choice][1]
        return next((text for key, text in texts if key == choice and text), next((t for _, t in texts if t), ""))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").removeprefix("\ufeff")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which nothing further on can encode.
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.removeprefix("\ufeff")  # the text itself where nothing is wrong with it: rows may share it


def number_of(value: Any) -> float | None:
    """A finite number, or None."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def value_at(record: Mapping[str, Any], column: str | None) -> Any:
    """The value of a column; a dot in its name leads into a struct, unless a column has that very name."""
    if column is None:
        return None
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _several(value: Sequence[Any] | Mapping[Any, Any]) -> list[tuple[str, str]]:
    """(key, text) of every entry; keys are those of an object, or of Arrow's maps, which come as a list of pairs."""
    if isinstance(value, Mapping):
        wrapped = next((value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)), None)
        return [("", text_of(wrapped))] if wrapped is not None else [(str(k), text_of(v)) for k, v in value.items()]
    if value and all(isinstance(v, tuple) and len(v) == 2 for v in value):
        return [(str(key), text_of(inner)) for key, inner in value]
    return [("", text_of(inner)) for inner in value]
