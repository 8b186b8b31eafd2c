"""Which column plays which part: the conventions of LAION, DataComp, COYO, img2dataset, open_clip and Hugging Face."""

from __future__ import annotations

import difflib
import functools
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from datapipe.sources.row_index import NOT_DOWNLOADED, DamagedError, ImagePlace, InputRow, RowFacts
from datapipe.sources.settings import SourceSettings
from datapipe.sources.tar_keys import IMAGE_ENDINGS
from datapipe.sources.values import number_of, text_of, value_at

# Compared without regard to case; the first name that the table has is taken.
URL_NAMES = ("url", "image_url", "img_url", "coco_url", "flickr_url")
ALT_TEXT_NAMES = ("caption", "text", "alt_text", "alt", "title", "txt", "captions", "texts")
LICENCE_NAMES = ("license", "licence")
PATH_NAMES = (
    "file_name", "filename", "filepath", "file_path", "image_path", "img_path", "image_file", "path", "image", "img",
)  # fmt: skip
"""Columns of paths, and of URLs as well: each value says which it is."""
CONTENT_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "picture", "photo", "bytes")
"""Columns of images, if their type is that of bytes."""
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

LONGEST_PATH = 1024
"""Bytes of a path or URL that came as bytes; longer ones are images."""

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://\S+")
_IN_BUCKET = re.compile(r"(s3|gs|gcs)://.+")


@dataclass(frozen=True)
class Columns:
    """The table's own names for what a row needs; a dot leads into a struct. `image`: of bytes, or of paths. `scores`:
    (canonical name, column), sorted. `status`: img2dataset's, of tables that hold its images."""

    url: str | None
    image: str | None
    alt_text: str | None
    licence: str | None
    scores: tuple[tuple[str, str], ...]
    status: str | None = None

    @property
    def names(self) -> list[str]:
        single = (self.url, self.image, self.alt_text, self.licence, self.status)
        return list(dict.fromkeys([*(n for n in single if n is not None), *(column for _, column in self.scores)]))

    def described(self, total: int, lists: Iterable[str] = (), choice: int | str | None = None) -> str:
        """In words. `total`: columns that the table has; `lists`: the columns that hold several texts a row; `choice`:
        which of several captions is taken, None for the first."""
        several = set(lists)

        def told(part: str, column: str | None, taken: int | str | None = None) -> list[str]:
            shown = " ".join((column or "").split())
            which = f" (list: {'first' if taken is None else repr(taken)})" if column in several else ""
            return [f"{part} `{shown}`{which}"] if column is not None else []

        parts = [
            *told("URL column", self.url),
            *told("image column", self.image),
            *told("caption", self.alt_text, choice),
            *told("license", self.licence),
            *(f"{name} `{column}`" for name, column in self.scores),
        ]
        ignored = total - len(self.names)
        return ", ".join([*parts, *([f"{ignored} column{'s' * (ignored > 1)} ignored"] if ignored > 0 else [])])


def recognize(
    names: Sequence[str], settings: SourceSettings, types: Mapping[str, pa.DataType] | None = None
) -> Columns:
    """The columns that play a part. Raises KeyError with what is wrong about an override, or ambiguous.

    types: Arrow type by name, where known. Columns inside structs are among the names, dotted.
    """
    chosen = _Chooser(names)
    content = None if settings.image_column else _content_column(names, types or {})
    url = chosen("url_column", settings.url_column, URL_NAMES)
    image = content or chosen("image_column", settings.image_column, () if url is not None else PATH_NAMES)
    prefix = url.rpartition(".")[0].lower() if url is not None else ""
    beside = f"{prefix}." if prefix else ""
    alt_text = chosen("alt_text_column", settings.alt_text_column, ALT_TEXT_NAMES)
    licence = chosen("licence_column", settings.licence_column, LICENCE_NAMES)
    scores = ((score, chosen("", None, known)) for score, known in SCORE_NAMES.items())
    columns = Columns(
        url=url,
        image=image,
        alt_text=alt_text or chosen("alt_text_column", None, ALT_TEXT_NAMES, beside),
        licence=licence or chosen("licence_column", None, LICENCE_NAMES, beside),
        scores=tuple((score, column) for score, column in sorted(scores) if column is not None),
        status=chosen("", None, ("status",)) if content else None,
    )
    twice = [name for name in columns.names if list(names).count(name) > 1]
    if twice:
        raise KeyError(f"the column {twice[0]} is there twice; rename one of them")
    return columns


class _Chooser:
    """Finds the column for a part that a table's columns may play. Raises KeyError."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._lower: dict[str, list[str]] = {}
        for name in names:
            self._lower.setdefault(name.strip().lower(), []).append(name)

    def __call__(self, key: str, override: str | None, known: Sequence[str], prefix: str = "") -> str | None:
        """The column that the setting `source.{key}` names, else the first that is `known`, behind `prefix`."""
        if override is not None:
            found = [override] if override in self._names else self._lower.get(override.lower(), [])
            if not found:
                asked = f"no column {override} (source.{key}) among {listed(self._names)}"
                raise KeyError(f"{asked}{_hint(override, self._names)}")
        else:
            found = next((self._lower[prefix + n] for n in known if prefix + n in self._lower), [])
        if len(set(found)) > 1:
            raise KeyError(f"has both {' and '.join(found)}; set source.{key}={found[0]}, or ={found[1]}")
        return found[0] if found else None


def _content_column(names: Sequence[str], types: Mapping[str, pa.DataType]) -> str | None:
    """The column that holds images: bytes under a known name, or Hugging Face's {bytes, path}."""
    images = [name for name in names if _is_hugging_face_image(types.get(name))]
    lower = {name.lower(): name for name in names if name in images or _is_binary(types.get(name))}
    known = next((lower[name] for name in CONTENT_NAMES if name in lower), None)
    return known or (images[0] if len(images) == 1 else None)


def _is_binary(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_hugging_face_image(kind: pa.DataType | None) -> bool:
    if kind is None or not pa.types.is_struct(kind):
        return False
    return any(field.name == "bytes" and _is_binary(field.type) for field in kind)


def _is_list_of_images(kind: pa.DataType | None) -> bool:
    if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return _is_binary(kind.value_type) or _is_hugging_face_image(kind.value_type)


def columns_of_table(
    names: Sequence[str], settings: SourceSettings, where: str, types: Mapping[str, pa.DataType] | None = None
) -> Columns:
    """The columns of a table, which must have one for URLs, images or paths. Raises DamagedError."""
    try:
        columns = recognize(names, settings, types)
    except KeyError as error:
        raise DamagedError(f"input {where}: {error.args[0]}") from None
    if columns.url is None and columns.image is None:
        near = [n for n in names if any(part in n.lower() for part in URL_LIKE)]
        several = next((n for n in names if _is_list_of_images((types or {}).get(n))), None)
        if several is not None:
            raise DamagedError(
                f"input {where}: {several} holds several images a row; save a table with one image a row"
            )
        near = near or difflib.get_close_matches("url", list(names), n=1, cutoff=0.3)
        binary = any(_is_binary((types or {}).get(n)) for n in near[:1])
        key = "image_column" if binary else "url_column"
        guess = (
            f"source.{key}={near[0]} if that is it"
            if near
            else "source.url_column to the one that holds URLs, or source.image_column to that of images or their paths"
        )
        raise DamagedError(f"input {where}: no url column among {listed(names)}; set {guess}")
    return columns


@functools.lru_cache(maxsize=1024)
def columns_of_keys(keys: tuple[str, ...], settings: SourceSettings) -> Columns:
    """The columns of one JSON object, whose keys may be others than its neighbors'. A column that the recipe names and
    this object lacks is a missing value."""
    present = settings.model_copy(
        update={
            name: None
            for name in ("url_column", "image_column", "alt_text_column", "licence_column")
            if (wanted := getattr(settings, name)) and wanted.lower() not in {key.lower() for key in keys}
        }
    )
    try:
        return recognize(keys, present)
    except KeyError:  # two keys that differ in case alone: the first of them
        first = {key.lower(): key for key in reversed(keys)}
        return recognize([key for key in keys if first[key.lower()] == key], present)


def is_url(value: str) -> bool:
    return _URL.fullmatch(value.strip()) is not None


def is_in_bucket(path: str) -> bool:
    """Whether a table's URL is one of an object store, which is read with the user's credentials and not fetched."""
    return _IN_BUCKET.fullmatch(path) is not None


def is_place(value: str) -> bool:
    """Whether it looks like a URL, or like the path of an image."""
    value = value.strip()
    name, _, ending = value.replace("\\", "/").rpartition("/")[2].rpartition(".")
    return is_url(value) or (bool(name) and ending.lower() in IMAGE_ENDINGS)


def facts_of(record: Mapping[str, Any], columns: Columns, settings: SourceSettings) -> RowFacts:
    """What a record says in words and numbers."""
    found = ((name, number_of(value_at(record, column))) for name, column in columns.scores)
    return RowFacts(
        url=text_of(value_at(record, columns.url)).strip(),
        alt_text=text_of(value_at(record, columns.alt_text), settings.alt_text_choice),
        licence=text_of(value_at(record, columns.licence)),
        scores=tuple((name, value) for name, value in found if value is not None),
    )


def row_of(record: Mapping[str, Any], columns: Columns, settings: SourceSettings, folder: str) -> InputRow:
    """A row of a table. `folder`: the table's own, relative to the input's root; paths are relative to it."""
    facts = facts_of(record, columns, settings)
    if columns.image is None:
        return _row_of_url(facts)
    status = text_of(value_at(record, columns.status))
    value = value_at(record, columns.image)
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes) and not (len(value) < LONGEST_PATH and is_place(text_of(value))):
        return InputRow(facts, value)
    place = text_of(value).strip()
    if is_url(place) or is_in_bucket(place):
        return _row_of_url(replace(facts, url=place))
    if place:
        # Tables that were written on Windows have backslashes. Without the folder, the 0.jpg of two would be one.
        file = posixpath.join(folder, place.replace("\\", "/"))
        return InputRow(replace(facts, url=facts.url or file), _whole_file(file))
    if status and status != "success":
        return not_downloaded(facts, status, record.get("error_message"))
    return _row_of_url(facts) if facts.url else InputRow(facts, problem=f"the column {columns.image} is empty")


def not_downloaded(facts: RowFacts, status: str, detail: object) -> InputRow:
    """A row of img2dataset's whose image it does not have."""
    return InputRow(facts, problem=f"{NOT_DOWNLOADED}{status} {text_of(detail)}".strip())


def _row_of_url(facts: RowFacts) -> InputRow:
    return InputRow(facts, _whole_file(facts.url) if is_in_bucket(facts.url) else None)


def _whole_file(path: str) -> ImagePlace:
    return ImagePlace(path.encode("utf-8", "surrogateescape"), 0, None)


def listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(" ".join(n.split())[:40] or "''" for n in names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown or "none"


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else "; name one of these or leave it out"
