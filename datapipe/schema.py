"""The contract between the stages, the shards and the trainer: what a sample is, and its one Arrow schema."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pyarrow as pa

from datapipe.errors import ShardError

SCHEMA_VERSION = 1


class StageName(str, Enum):
    """The stages, in the order in which a row meets them."""

    FETCH = "fetch"
    SCREEN = "screen"
    CAPTION = "caption"
    TAG = "tag"
    GROUND = "ground"
    SEGMENT = "segment"
    SELECT = "select"


class Outcome(str, Enum):
    """What became of an input row. Input rows = kept + dropped + failed, in every shard."""

    KEPT = "kept"
    DROPPED = "dropped"
    FAILED = "failed"


class Reason(str, Enum):
    """Every reason for which a row can leave the pipeline."""

    # fetch
    BAD_URL = "bad_url"
    FORBIDDEN_ADDRESS = "forbidden_address"
    OPT_OUT = "opt_out"
    HTTP_STATUS = "http_status"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    EMPTY_BODY = "empty_body"
    UNREADABLE = "unreadable"
    # screen
    UNDECODABLE = "undecodable"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    ASPECT = "aspect"
    WHITE_BACKGROUND = "white_background"
    SCORE_COLUMN = "score_column"
    EXACT_DUPLICATE = "exact_duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    # caption, tag, ground
    NO_CAPTION = "no_caption"
    TOO_FEW_TAGS = "too_few_tags"
    TOO_MANY_TAGS = "too_many_tags"
    TOO_FEW_BOXES = "too_few_boxes"
    TOO_MANY_BOXES = "too_many_boxes"
    # select
    TOO_FEW_ENTITIES = "too_few_entities"
    # any stage
    ERROR = "error"
    KILLED_WORKER = "killed_worker"


class Rejection(str, Enum):
    """Why a candidate box did not become an entity of its image."""

    SCORE = "score"
    TEXT_SCORE = "text_score"
    OVERLAPS_SAME_OBJECT = "nms"
    AREA = "area"
    ASPECT = "aspect"
    LABEL = "label"
    MASK_FILL = "mask_fill"
    CONTAINED = "contained"
    SURPLUS = "surplus"


@dataclass(frozen=True)
class Verdict:
    """How a row left the pipeline. `retryable`: trying the row again later could help (a timeout, a 503)."""

    outcome: Outcome
    stage: StageName
    reason: Reason | None = None
    detail: str = ""
    retryable: bool = False


@dataclass(frozen=True)
class Tag:
    """A noun of the caption. `span`: [start, end) characters of the caption."""

    text: str
    span: tuple[int, int]


@dataclass(frozen=True)
class RLE:
    """COCO run-length encoding of a mask. `size`: (height, width) pixels; `counts`: pycocotools' compressed ASCII."""

    size: tuple[int, int]
    counts: str


@dataclass(frozen=True)
class Entity:
    """One grounded subject, or a candidate for one.

    `box`: (x1, y1, x2, y2) in pixels of the stored image. `score`: the box's best token probability; `text_score`: the
    mean probability of its tag's own tokens. `rejected`: None for an entity, else why the candidate is none.
    """

    tag: str
    span: tuple[int, int]
    box: tuple[float, float, float, float]
    score: float
    text_score: float
    mask: RLE | None = None
    predicted_iou: float | None = None
    stability: float | None = None
    rejected: Rejection | None = None


@dataclass(frozen=True)
class Sample:
    """One input row on its way through the stages. A row without a verdict is still under way."""

    row: int
    """Position in the whole input, from 0; the key and the order of everything follow from it."""
    url: str = ""
    alt_text: str = ""
    licence: str = ""
    scores: tuple[tuple[str, float], ...] = ()
    """Score columns that came with the input (punsafe, pwatermark, aesthetic, similarity), by name, sorted."""
    image: bytes | None = None
    """The encoded image, exactly as it was fetched unless it had to be converted."""
    http_status: int | None = None
    opt_out: str = ""
    """The X-Robots-Tag or similar that was found, verbatim."""
    width: int = 0
    height: int = 0
    original_width: int = 0
    original_height: int = 0
    sha256: str = ""
    """Of the bytes as fetched."""
    phash: int | None = None
    """64-bit perceptual hash, as an unsigned integer."""
    caption: str = ""
    caption_model: str = ""
    tags: tuple[Tag, ...] = ()
    candidates: tuple[Entity, ...] = ()
    verdict: Verdict | None = None

    @property
    def key(self) -> str:
        return f"{self.row:010d}"

    @property
    def entities(self) -> tuple[Entity, ...]:
        """The candidates that selection accepted, best score first."""
        return tuple(c for c in self.candidates if c.rejected is None)

    def replace(self, **changes: Any) -> Sample:
        return dataclasses.replace(self, **changes)

    def dropped(self, stage: StageName, reason: Reason, detail: str = "") -> Sample:
        return self.replace(verdict=Verdict(Outcome.DROPPED, stage, reason, detail))

    def failed(self, stage: StageName, reason: Reason, detail: str = "", retryable: bool = False) -> Sample:
        return self.replace(verdict=Verdict(Outcome.FAILED, stage, reason, detail, retryable))

    def kept(self) -> Sample:
        return self.replace(verdict=Verdict(Outcome.KEPT, StageName.SELECT))


@dataclass(frozen=True)
class Slice:
    """A fixed run of input rows that becomes one shard."""

    index: int
    samples: tuple[Sample, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"shard-{self.index:06d}"


_ENTITY = pa.struct(
    [
        ("tag", pa.string()),
        ("span", pa.list_(pa.int32(), 2)),
        ("box", pa.list_(pa.float64(), 4)),
        ("score", pa.float64()),
        ("text_score", pa.float64()),
        ("mask", pa.struct([("size", pa.list_(pa.int32(), 2)), ("counts", pa.string())])),
        ("predicted_iou", pa.float64()),
        ("stability", pa.float64()),
        ("rejected", pa.string()),
    ]
)

IDENTITIES = "identities.parquet"
IDENTITIES_SCHEMA = pa.schema([("key", pa.string()), ("entity", pa.int64()), ("identity", pa.string())])
"""A dataset that knows the same subject in several images says so in this file beside its shards, a row for each entity
that is known: the key of its sample, its number among the sample's entities, and a name for who it is."""

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        ("url", pa.string()),
        ("alt_text", pa.string()),
        ("licence", pa.string()),
        ("scores", pa.map_(pa.string(), pa.float64())),
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
        ("tags", pa.list_(pa.struct([("text", pa.string()), ("span", pa.list_(pa.int32(), 2))]))),
        ("candidates", pa.list_(_ENTITY)),
        ("outcome", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("retryable", pa.bool_()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
"""A sidecar: one row for every input row. `outcome` is null while a row is under way; offsets are of tar members'
data, in bytes."""

_WITH_IMAGE = SCHEMA.append(pa.field("image", pa.binary()))


@dataclass(frozen=True)
class Members:
    """Where a sample's two members lie in its tar: data offsets and sizes in bytes."""

    image_offset: int
    image_size: int
    json_offset: int
    json_size: int


def to_table(samples: Sequence[Sample], members: Mapping[int, Members] | None = None) -> pa.Table:
    """Samples without their images, by `SCHEMA`. `members`: by row, for those that are in the tar."""
    members = members or {}
    rows = [_to_row(s) | (dataclasses.asdict(members[s.row]) if s.row in members else {}) for s in samples]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Sample]:
    """Inverse of `to_table`; images are None unless the table has them."""
    return [_from_row(row) for row in table.to_pylist()]


def slice_to_ipc(work: Slice) -> bytes:
    """A slice with its images, to be handed from one worker to the next."""
    rows = [_to_row(s) | {"image": s.image} for s in work.samples]
    table = pa.Table.from_pylist(rows, schema=_WITH_IMAGE.with_metadata({"index": str(work.index)}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def slice_from_ipc(data: bytes) -> Slice:
    """Inverse of `slice_to_ipc`."""
    table = pa.ipc.open_stream(data).read_all()
    return Slice(int(table.schema.metadata[b"index"]), tuple(from_table(table)))


def to_json(sample: Sample) -> bytes:
    """The `{key}.json` of a sample: what the trainer reads. Accepted entities only; keys sorted; ends with a
    newline."""
    row = _to_row(sample)
    tree = {
        "schema_version": SCHEMA_VERSION,
        **{name: row[name] for name in _JSON_FIELDS},
        "scores": dict(row["scores"]),
        "phash": None if sample.phash is None else f"{sample.phash:016x}",
        "entities": [_entity_to_row(e) for e in sample.entities],
    }
    for entity in tree["entities"]:
        del entity["rejected"]
    return (json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


_JSON_FIELDS = (
    "row", "key", "url", "alt_text", "licence", "http_status", "opt_out", "width", "height", "original_width",
    "original_height", "sha256", "caption", "caption_model", "tags",
)  # fmt: skip


def from_json(data: bytes) -> Sample:
    """A kept sample as its shard tells it: with accepted entities only, and without its image. Raises ShardError."""
    try:
        tree = json.loads(data)
        version = tree["schema_version"]
        if version != SCHEMA_VERSION:
            raise ShardError(f"sample of schema version {version}; this release reads {SCHEMA_VERSION}")
        phash = None if tree["phash"] is None else int(tree["phash"], 16)
        row = {**tree, "phash": phash, "candidates": tree["entities"]}
        return _from_row(row | {"outcome": Outcome.KEPT.value, "stage": StageName.SELECT.value})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ShardError(f"not a sample of this project: {data[:60]!r}") from None


def clean_text(text: str) -> str:
    """Web text as UTF-8 can hold it: lone surrogates become question marks and control characters spaces, each one
    for one, so that spans stay right."""
    return _CONTROL.sub(" ", text.encode("utf-8", "replace").decode("utf-8"))


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _to_row(sample: Sample) -> dict[str, Any]:
    verdict = sample.verdict
    return {
        "row": sample.row,
        "key": sample.key,
        "url": clean_text(sample.url),
        "alt_text": clean_text(sample.alt_text),
        "licence": clean_text(sample.licence),
        "scores": [(clean_text(name), float(value)) for name, value in sample.scores],
        "http_status": sample.http_status,
        "opt_out": clean_text(sample.opt_out),
        "width": sample.width,
        "height": sample.height,
        "original_width": sample.original_width,
        "original_height": sample.original_height,
        "sha256": sample.sha256,
        "phash": sample.phash,
        "caption": clean_text(sample.caption),
        "caption_model": clean_text(sample.caption_model),
        "tags": [{"text": clean_text(t.text), "span": list(t.span)} for t in sample.tags],
        "candidates": [_entity_to_row(c) for c in sample.candidates],
        "outcome": verdict and verdict.outcome.value,
        "stage": verdict and verdict.stage.value,
        "reason": verdict and verdict.reason and verdict.reason.value,
        "detail": verdict and clean_text(verdict.detail),
        "retryable": verdict and verdict.retryable,
    }


def _entity_to_row(entity: Entity) -> dict[str, Any]:
    # A whole number must read the same in JSON whether or not it has been through Arrow, which knows columns of floats.
    return {
        "tag": clean_text(entity.tag),
        "span": list(entity.span),
        "box": [float(v) for v in entity.box],
        "score": float(entity.score),
        "text_score": float(entity.text_score),
        "mask": entity.mask and {"size": list(entity.mask.size), "counts": entity.mask.counts},
        "predicted_iou": _float(entity.predicted_iou),
        "stability": _float(entity.stability),
        "rejected": entity.rejected and entity.rejected.value,
    }


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _from_row(row: Mapping[str, Any]) -> Sample:
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
    plain = {name: row[name] for name in _PLAIN_FIELDS}
    return Sample(
        **plain,
        image=row.get("image"),
        scores=tuple(sorted(dict(row["scores"]).items())),
        tags=tuple(Tag(t["text"], (t["span"][0], t["span"][1])) for t in row["tags"] or ()),
        candidates=tuple(_entity_from_row(c) for c in row["candidates"] or ()),
        verdict=verdict,
    )


_PLAIN_FIELDS = (
    "row", "url", "alt_text", "licence", "http_status", "opt_out", "width", "height", "original_width",
    "original_height", "sha256", "phash", "caption", "caption_model",
)  # fmt: skip


def _entity_from_row(row: Mapping[str, Any]) -> Entity:
    mask, rejected = row["mask"], row.get("rejected")
    x1, y1, x2, y2 = row["box"]
    return Entity(
        row["tag"],
        (row["span"][0], row["span"][1]),
        (x1, y1, x2, y2),
        row["score"],
        row["text_score"],
        RLE((mask["size"][0], mask["size"][1]), mask["counts"]) if mask else None,
        row["predicted_iou"],
        row["stability"],
        Rejection(rejected) if rejected else None,
    )
