"""The one check of a sample, whoever wrote it: what passes can be drawn, exported and learned from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from datapipe.schema.rle import MAX_PIXELS, RLE
from datapipe.schema.sample import Entity, Sample, Tag
from datapipe.schema.table import PLAIN_FIELDS, SCHEMA

_NULLABLE = {f.name for f in dataclasses.fields(Sample) if f.default is None}
_TEXTS = {name for name in PLAIN_FIELDS if pa.types.is_string(SCHEMA.field(name).type)}
_FLOATS = {name for name in PLAIN_FIELDS if pa.types.is_floating(SCHEMA.field(name).type)}
_LIMITS = {
    name: 2 ** (kind.bit_width - pa.types.is_signed_integer(kind))
    for name in PLAIN_FIELDS
    if pa.types.is_integer(kind := SCHEMA.field(name).type)
}
"""The first number that the column of each integer field cannot hold; none is below 0."""


def sample_problems(sample: Sample) -> Iterator[str]:
    """What is wrong with a sample: fields of another type, and in a kept one also spans, boxes and masks that do not
    fit caption and image. Candidates that are no entities may lie anywhere, but must be numbers."""
    wrong = [*_wrong_fields(sample), *_wrong_candidates(sample)]
    yield from wrong
    if wrong or not sample.is_kept:
        return
    if not 0 < sample.width * sample.height <= MAX_PIXELS:
        yield f"an image of {sample.width} x {sample.height} pixels"
        return
    for start, end in [t.span for t in sample.tags] + [e.span for e in sample.entities]:
        if not 0 <= start < end <= len(sample.caption):
            yield f"span {start} to {end} lies outside of the caption's {len(sample.caption)} characters"
    for entity in sample.entities:
        yield from (f"{entity.tag}: {what}" for what in entity_problems(entity, sample.width, sample.height))


def entity_problems(entity: Entity, width: int, height: int) -> Iterator[str]:
    """What is wrong with a box and mask on an image of this size, in pixels."""
    x1, y1, x2, y2 = entity.box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        yield f"box {entity.box} lies outside of the image's {width} x {height} pixels"
    if entity.mask is not None and entity.mask.size != (height, width):
        yield f"mask of {entity.mask.size[1]} x {entity.mask.size[0]} pixels on an image of {width} x {height}"
    elif entity.mask is not None and not entity.mask.is_whole():
        yield "its mask's run lengths do not fill its size"


def _wrong_fields(sample: Sample) -> Iterator[str]:
    for name in PLAIN_FIELDS:
        value = getattr(sample, name)
        if value is None and name in _NULLABLE:
            continue
        if name in _TEXTS and not _is_text(value):
            yield f"{name} is {_said(value)} and no text"
        elif name in _LIMITS and not (_is_integer(value) and 0 <= value < _LIMITS[name]):
            yield f"{name} is {_said(value)}"
        elif name in _FLOATS and not _is_finite(value):
            yield f"{name} is {_said(value)} and no number"
    for name, value in sample.scores:
        if not (_is_text(name) and _is_finite(value)):
            yield f"score {_said(name)} is {_said(value)}"
    yield from (f"tag {_said(tag)}" for tag in sample.tags if not _is_whole_tag(tag))


def _wrong_candidates(sample: Sample) -> Iterator[str]:
    for number, entity in enumerate(sample.candidates):
        what = next(_wrong_in(entity), None)
        if what is not None:
            yield f"entity {number}, {_said(entity.tag)}: {what}"


def _wrong_in(entity: Entity) -> Iterator[str]:
    if not _is_text(entity.tag):
        yield "its tag is no text"
    if not _is_span(entity.span):
        yield f"its span is {_said(entity.span)}"
    if not all(map(_is_finite, entity.box)):
        yield f"its box is {_said(entity.box)}"
    if not (_is_finite(entity.score) and _is_finite(entity.text_score)):
        yield f"its scores are {_said(entity.score)} and {_said(entity.text_score)}"
    for name in ("rival_score", "predicted_iou", "stability"):
        value = getattr(entity, name)
        if value is not None and not _is_finite(value):
            yield f"its {name} is {_said(value)}"
    if entity.mask is not None and not _has_whole_numbers(entity.mask):
        yield f"its mask is of size {_said(entity.mask.size)}"


def _is_whole_tag(tag: Tag) -> bool:
    number = tag.number is None or _is_integer(tag.number)
    return _is_text(tag.text) and _is_span(tag.span) and isinstance(tag.left_out, bool) and number


def _has_whole_numbers(mask: RLE) -> bool:
    return all(map(_is_integer, mask.size)) and isinstance(mask.counts, str)


def _is_span(span: tuple[Any, Any]) -> bool:
    return all(_is_integer(value) and 0 <= value < 2**31 for value in span)


def _is_text(value: Any) -> bool:
    """Whether it is a text that UTF-8 can hold: JSON can spell half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    # math.isfinite raises for integers that no float can hold.
    return isinstance(value, float | int) and not isinstance(value, bool) and -1e300 < value < 1e300


def _said(value: Any) -> str:
    return repr(value)[:60]
