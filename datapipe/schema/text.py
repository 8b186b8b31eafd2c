"""Web text made fit to store."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_TURNING = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
"""Embeddings, overrides and isolates, with which a text can stand otherwise than it reads, or turn what follows it."""


def clean_text(text: str) -> str:
    """Web text as UTF-8 can hold it: lone surrogates become question marks and control characters become spaces, one
    for one, so that spans stay right."""
    return _CONTROL.sub(" ", text.encode("utf-8", "replace").decode("utf-8"))


def printable(text: str) -> str:
    """Web text as a terminal may show it: as `clean_text` has it, and with a sign for every control character of
    direction. Marks of direction, which Arabic and Hebrew texts need, stay."""
    return _TURNING.sub("\ufffd", clean_text(text))


def decisive(value: float, limit: float) -> str:
    """A number with three decimals, or with as many more as tell on which side of `limit` it lies."""
    side = (value > limit) - (value < limit)
    texts = (f"{value:.{digits}f}" for digits in range(3, 18))
    return next((t for t in texts if (float(t) > limit) - (float(t) < limit) == side), repr(value))
