"""Samples as Arrow: the sidecar's one schema, its rows, and slices on their way between workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.schema.rle import RLE
from datapipe.schema.sample import (
    CLASSIFIED,
    SCORES,
    Entity,
    Outcome,
    Reason,
    Rejection,
    Sample,
    Slice,
    StageName,
    Tag,
    Verdict,
)
from datapipe.schema.text import clean_text
from subject_diffusion.errors import ShardError, one_line

SCHEMA_VERSION = 2

_SPAN = pa.list_(pa.int32(), 2)
_TAG = pa.struct([("text", pa.string()), ("span", _SPAN), ("left_out", pa.bool_()), ("number", pa.int32())])
_ENTITY = pa.struct(
    [
        ("tag", pa.string()),
        ("span", _SPAN),
        ("box", pa.list_(pa.float64(), 4)),
        ("score", pa.float64()),
        ("text_score", pa.float64()),
        ("rival_score", pa.float64()),
        ("mask", pa.struct([("size", pa.list_(pa.int32(), 2)), ("counts", pa.string())])),
        ("predicted_iou", pa.float64()),
        ("stability", pa.float64()),
        ("rejected", pa.string()),
        ("desc", pa.string()),
    ]
)

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        ("url", pa.string()),
        ("alt_text", pa.string()),
        ("licence", pa.string()),
        ("scores", pa.struct([(name, pa.float64()) for name in (*SCORES, *CLASSIFIED)])),
        ("clip", pa.string()),
        ("time_s", pa.float64()),
        ("http_status", pa.int32()),
        ("opt_out", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
        ("phash", pa.uint64()),
        ("caption", pa.string()),
        ("caption_model", pa.string()),
        ("tags", pa.list_(_TAG)),
        ("candidates", pa.list_(_ENTITY)),
        ("outcome", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("retryable", pa.bool_()),
        ("thumbnail", pa.binary()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
"""A sidecar: one row for every input row. `outcome` is null while a row is under way; offsets are those of the tar
members' data, in bytes. A column with the name and type of a field of `Sample` holds that field."""

_ADDED_LATER = ("clip", "time_s")

IDENTITIES = "identities.parquet"
IDENTITIES_SCHEMA = pa.schema([("key", pa.string()), ("entity", pa.int64()), ("identity", pa.string())])
"""A dataset that knows the same subject in several images says so in this file beside its shards, one row per entity
that is known: the key of its sample, its number among the sample's entities, and a name for who it is."""

PLAIN_FIELDS = tuple(
    f.name
    for f in dataclasses.fields(Sample)
    if f.name in SCHEMA.names and f.name != "thumbnail" and not pa.types.is_nested(SCHEMA.field(f.name).type)
)
"""Fields of `Sample` that sidecar and JSON both hold as they are."""

_WITH_IMAGE = SCHEMA.append(pa.field("image", pa.binary()))


@dataclass(frozen=True)
class TarMembers:
    """Where a sample's two members lie in its tar: data offsets and sizes in bytes."""

    image_offset: int
    image_size: int
    json_offset: int
    json_size: int


def to_table(samples: Sequence[Sample], members: Mapping[int, TarMembers] | None = None) -> pa.Table:
    """Samples without their images, by `SCHEMA`. `members`: by row, for those that are in the tar."""
    members = members or {}
    rows = [to_row(s) | (dataclasses.asdict(members[s.row]) if s.row in members else {}) for s in samples]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def current(table: pa.Table) -> pa.Table:
    """A sidecar with the columns of SCHEMA: of an earlier release's, scores, columns and fields of candidates that it
    did not know are null. Raises ShardError for other columns."""
    if table.schema.equals(SCHEMA):
        return table
    unknown = {name: SCHEMA.field(name).type for name in _ADDED_LATER if name not in table.column_names}
    known = [field for field in SCHEMA if field.name not in unknown]
    if table.column_names != [field.name for field in known] or not all(
        map(_is_part_of, table.schema.types, [field.type for field in known])
    ):
        raise ShardError("has other columns than this release's sidecars")
    for name, kind in unknown.items():
        table = table.append_column(name, pa.nulls(len(table), kind))
    return table.select(SCHEMA.names).cast(SCHEMA)


def _is_part_of(earlier: pa.DataType, today: pa.DataType) -> bool:
    """Whether they are the same type, or structs, of which `today` may have more fields, or lists of such."""
    if pa.types.is_list(earlier) and pa.types.is_list(today):
        return _is_part_of(earlier.value_type, today.value_type)
    if pa.types.is_struct(earlier) and pa.types.is_struct(today):
        types = {field.name: field.type for field in today}
        return all(field.name in types and _is_part_of(field.type, types[field.name]) for field in earlier)
    return bool(earlier.equals(today))


def from_table(table: pa.Table) -> list[Sample]:
    """Inverse of `to_table`; images are None unless the table has them. Raises ShardError for a row that is no
    sample."""
    samples = []
    for row in table.to_pylist():
        try:
            samples.append(from_row(row))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ShardError(f"row {row.get('row')} is no sample: {one_line(error)}") from None
    return samples


def to_parquet(table: pa.Table, rows_per_group: int) -> bytes:
    """A table as a parquet file that viewers read in parts: by row groups and, in these, by the page index, which tells
    where the pages of about 1 MiB begin."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=rows_per_group, write_page_index=True)
    return bytes(sink.getvalue())


def slice_to_ipc(work: Slice) -> bytes:
    """A slice with its images, to be handed from one worker to the next."""
    rows = [to_row(s) | {"image": s.image} for s in work.samples]
    table = pa.Table.from_pylist(rows, schema=_WITH_IMAGE.with_metadata({"index": str(work.index)}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def slice_from_ipc(data: bytes) -> Slice:
    """Inverse of `slice_to_ipc`."""
    table = pa.ipc.open_stream(data).read_all()
    return Slice(int(table.schema.metadata[b"index"]), tuple(from_table(table)))


def to_row(sample: Sample) -> dict[str, Any]:
    """A sample as a row of `SCHEMA`, without offsets."""
    verdict = sample.verdict
    return {
        **{name: _plain(getattr(sample, name)) for name in PLAIN_FIELDS},
        "key": sample.key,
        "scores": {name: float(value) for name, value in sample.scores},
        "tags": [_tag_to_row(t) for t in sample.tags],
        "candidates": [entity_to_row(c) for c in sample.candidates],
        "outcome": verdict and verdict.outcome.value,
        "stage": verdict and verdict.stage.value,
        "reason": verdict and verdict.reason and verdict.reason.value,
        "detail": verdict and clean_text(verdict.detail),
        "retryable": verdict and verdict.retryable,
        "thumbnail": sample.thumbnail,
    }


def from_row(row: Mapping[str, Any]) -> Sample:
    """Inverse of `to_row`; the image is None unless the row has it."""
    verdict = None
    if row["outcome"] is not None:
        reason = row.get("reason")
        verdict = Verdict(
            Outcome(row["outcome"]),
            StageName(row["stage"]),
            Reason(reason) if reason else None,
            row.get("detail") or "",
            bool(row.get("retryable")),
        )
    plain = {name: row[name] for name in PLAIN_FIELDS}
    return Sample(
        **plain,
        image=row.get("image"),
        thumbnail=row.get("thumbnail"),
        scores=tuple((name, value) for name, value in sorted(row["scores"].items()) if value is not None),
        tags=tuple(_tag_from_row(t) for t in row["tags"] or ()),
        candidates=tuple(_entity_from_row(c) for c in row["candidates"] or ()),
        verdict=verdict,
    )


def _tag_to_row(tag: Tag) -> dict[str, Any]:
    return {"text": clean_text(tag.text), "span": list(tag.span), "left_out": tag.left_out, "number": tag.number}


def _tag_from_row(row: Mapping[str, Any]) -> Tag:
    return Tag(row["text"], (row["span"][0], row["span"][1]), row["left_out"], row.get("number"))


def entity_to_row(entity: Entity) -> dict[str, Any]:
    # A whole number must read the same in JSON whether or not it has been through Arrow, which knows columns of floats.
    return {
        "tag": clean_text(entity.tag),
        "span": list(entity.span),
        "box": [float(v) for v in entity.box],
        "score": float(entity.score),
        "text_score": float(entity.text_score),
        "rival_score": _float(entity.rival_score),
        "mask": entity.mask and {"size": list(entity.mask.size), "counts": entity.mask.counts},
        "predicted_iou": _float(entity.predicted_iou),
        "stability": _float(entity.stability),
        "rejected": entity.rejected and entity.rejected.value,
        "desc": _plain(entity.desc),
    }


def _entity_from_row(row: Mapping[str, Any]) -> Entity:
    mask, rejected = row.get("mask"), row.get("rejected")
    x1, y1, x2, y2 = row["box"]
    return Entity(
        row["tag"],
        (row["span"][0], row["span"][1]),
        (x1, y1, x2, y2),
        row["score"],
        row["text_score"],
        RLE((mask["size"][0], mask["size"][1]), mask["counts"]) if mask else None,
        row.get("predicted_iou"),
        row.get("stability"),
        Rejection(rejected) if rejected else None,
        row.get("rival_score"),
        row.get("desc"),
    )


def _plain(value: Any) -> Any:
    return clean_text(value) if isinstance(value, str) else value


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
