"""Which column plays which part: the conventions of LAION, DataComp, COYO and img2dataset."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datapipe.errors import SourceError
from datapipe.sources.settings import SourceSettings

# Compared without regard to case; the first name that the table has is taken.
URL_NAMES = ("url", "image_url", "img_url")
ALT_TEXT_NAMES = ("caption", "text", "alt_text", "alt")
LICENCE_NAMES = ("license", "licence")
SCORE_NAMES = {
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2"),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark", "watermark_score"),
    # LAION's similarity is that of CLIP ViT-B/32: of two, the same model's is taken.
    "similarity": (
        "similarity",
        "clip_b32_similarity_score",
        "clip_similarity_vitb32",
        "clip_l14_similarity_score",
        "clip_similarity_vitl14",
    ),
}
URL_LIKE = ("url", "uri", "link", "href", "src", "image", "img")


@dataclass(frozen=True)
class Columns:
    """The table's own names for what a row needs. `scores`: (canonical name, column), sorted."""

    url: str | None
    alt_text: str | None
    licence: str | None
    scores: tuple[tuple[str, str], ...]

    @property
    def names(self) -> list[str]:
        single = [name for name in (self.url, self.alt_text, self.licence) if name is not None]
        return list(dict.fromkeys([*single, *(column for _, column in self.scores)]))


@dataclass(frozen=True)
class RowFacts:
    """What the input says about one row. `scores`: by canonical name, sorted, without the missing ones."""

    url: str = ""
    alt_text: str = ""
    licence: str = ""
    scores: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any], columns: Columns) -> RowFacts:
        def text_at(column: str | None) -> str:
            return _text(record.get(column)) if column is not None else ""

        found = ((name, _number(record.get(column))) for name, column in columns.scores)
        return cls(
            url=text_at(columns.url).strip(),
            alt_text=text_at(columns.alt_text),
            licence=text_at(columns.licence),
            scores=tuple((name, value) for name, value in found if value is not None),
        )


def recognise(names: Sequence[str], settings: SourceSettings) -> Columns:
    """The columns that play a part. Raises KeyError with what is wrong about an override."""
    lower: dict[str, str] = {}
    for name in names:
        lower.setdefault(name.lower(), name)

    def chosen(key: str, override: str | None, known: Sequence[str]) -> str | None:
        if override is None:
            return next((lower[n] for n in known if n in lower), None)
        if override in names:
            return override
        if override.lower() not in lower:
            raise KeyError(f"no column {override} (source.{key}) among {listed(names)}{_hint(override, names)}")
        return lower[override.lower()]

    found = ((score, chosen("", None, known)) for score, known in SCORE_NAMES.items())
    columns = Columns(
        url=chosen("url_column", settings.url_column, URL_NAMES),
        alt_text=chosen("alt_text_column", settings.alt_text_column, ALT_TEXT_NAMES),
        licence=chosen("licence_column", settings.licence_column, LICENCE_NAMES),
        scores=tuple((score, column) for score, column in sorted(found) if column is not None),
    )
    twice = [name for name in columns.names if list(names).count(name) > 1]
    if twice:
        raise KeyError(f"the column {twice[0]} is there twice; rename one of them")
    return columns


def columns_of_table(names: Sequence[str], settings: SourceSettings, where: str) -> Columns:
    """The same for a URL table, which must have a url column. Raises SourceError."""
    try:
        columns = recognise(names, settings)
    except KeyError as error:
        raise SourceError(f"input {where}: {error.args[0]}") from None
    if columns.url is None:
        near = [n for n in names if any(part in n.lower() for part in URL_LIKE)]
        near = near or difflib.get_close_matches("url", list(names), n=1, cutoff=0.3)
        guess = f"source.url_column={near[0]} if that is it" if near else "source.url_column to the one that holds URLs"
        raise SourceError(f"input {where}: no url column among {listed(names)}; set {guess}")
    return columns


def listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(" ".join(n.split())[:40] or "''" for n in names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown or "none"


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else "; name one of these or leave it out"


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    # JSON can spell half of a surrogate pair, which nothing further on can encode.
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
