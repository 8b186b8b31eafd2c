"""What a sample is: one input row on its way from a URL to a kept image with its entities."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from datapipe.schema.rle import RLE


class StageName(str, Enum):
    """The stages, in the order in which a row meets them."""

    FETCH = "fetch"
    SCREEN = "screen"
    NSFW = "nsfw"
    WATERMARK = "watermark"
    """Only where the recipe names a model for it, as `NSFW`."""
    CAPTION = "caption"
    TAG = "tag"
    GROUND = "ground"
    SEGMENT = "segment"
    SELECT = "select"
    DESCRIBE = "describe"
    """Only where the recipe has it; the one stage that sees rows after their last verdict."""
    CUSTOM = "custom"
    """A stage of the user's own, wherever the recipe puts it."""


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
    ROBOTS_TXT = "robots_txt"
    HTTP_STATUS = "http_status"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    BAD_FRAMING = "bad_framing"
    CONTENT_ENCODING = "content_encoding"
    TOO_LARGE = "too_large"
    EMPTY_BODY = "empty_body"
    UNREADABLE = "unreadable"
    # screen
    UNDECODABLE = "undecodable"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_SCANS = "too_many_scans"
    TOO_SMALL = "too_small"
    ASPECT = "aspect"
    WHITE_BACKGROUND = "white_background"
    SCORE_COLUMN = "score_column"
    EXACT_DUPLICATE = "exact_duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    # nsfw, watermark
    NSFW = "nsfw"
    WATERMARK = "watermark"
    # caption (and describe: no_answer), tag, ground
    NO_CAPTION = "no_caption"
    NO_ANSWER = "no_answer"
    TOO_FEW_TAGS = "too_few_tags"
    TOO_MANY_TAGS = "too_many_tags"
    TOO_FEW_BOXES = "too_few_boxes"
    TOO_MANY_BOXES = "too_many_boxes"
    # select
    TOO_FEW_ENTITIES = "too_few_entities"
    # a stage of the user's own: the verdict's detail says which reason
    CUSTOM = "custom"
    # fetch (its address) or screen (its bytes or pixels)
    BLOCKLISTED = "blocklisted"
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
    RIVAL = "rival"
    MASK_FILL = "mask_fill"
    MASK_SIZE = "mask_size"
    CROWDED = "crowded"
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
    """A noun of the caption. `text`: the caption's own word, in lower case; `span`: [start, end) characters of the
    caption. `left_out`: the detector's prompt had no room for it. `number`: how many were detected, where the word for
    it was put into the caption before the noun; see `SelectSettings.number_words`."""

    text: str
    span: tuple[int, int]
    left_out: bool = False
    number: int | None = None


@dataclass(frozen=True)
class Entity:
    """One grounded subject, or a candidate for one.

    `box`: (x1, y1, x2, y2) in pixels of the stored image. `score`: the box's best token probability, whichever noun's
    token it is; `text_score`: the mean probability of its tag's own tokens; `rival_score`: the best probability of
    another noun's token, None where there was no detector. `rejected`: None for an entity, else why the candidate is
    none. `desc`: what the subject looks like, in words, where a stage described it.
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
    rival_score: float | None = None
    desc: str | None = None


SCORES = ("aesthetic", "punsafe", "pwatermark", "similarity")
"""Scores that an input may bring for an image: LAION's and COYO's aesthetic score, the probabilities that it is unsafe
or has a watermark, and the CLIP similarity of image and alt text."""

CLASSIFIED = (StageName.NSFW.value, StageName.WATERMARK.value)
"""Scores that a classifier of the recipe gives: the probability of the labels for which it drops images."""


@dataclass(frozen=True)
class Sample:
    """One input row on its way through the stages. A row without a verdict is still under way."""

    row: int
    """Position in the whole input, from 0; the key and the order of everything follow from it."""
    url: str = ""
    alt_text: str = ""
    licence: str = ""
    scores: tuple[tuple[str, float], ...] = ()
    """Those of `SCORES` that came with the input and of `CLASSIFIED` that were found, by name, sorted."""
    image: bytes | None = None
    """The encoded image, exactly as it was fetched unless it had to be converted."""
    thumbnail: bytes | None = None
    """A small JPEG of an image that screening dropped, for people who check its rules."""
    clip: str | None = None
    """The video that the image is a frame of: its path in the input, `#`, and 16 hex digits that tell it from others of
    that path."""
    time_s: float | None = None
    """Where in it the frame is: seconds from its start."""
    http_status: int | None = None
    opt_out: str = ""
    """The X-Robots-Tag or similar that was found, verbatim."""
    width: int = 0
    height: int = 0
    original_width: int = 0
    original_height: int = 0
    sha256: str = ""
    """SHA-256 of the bytes as fetched."""
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

    @property
    def picture(self) -> bytes | None:
        """What there is to look at: the image, or what screening left of it."""
        return self.image or self.thumbnail

    def replace(self, **changes: Any) -> Sample:
        return dataclasses.replace(self, **changes)

    @property
    def is_kept(self) -> bool:
        return self.verdict is not None and self.verdict.outcome is Outcome.KEPT

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
