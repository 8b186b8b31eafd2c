"""What the stages ask of their models. A backend is any class with the `__call__` of one of these protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from datapipe.schema import RLE, Tag

Pixels = NDArray[np.uint8]
"""(H, W, 3) uint8 RGB."""

Box = tuple[float, float, float, float]
"""(x1, y1, x2, y2) in pixels of the image."""


@dataclass(frozen=True)
class Segment:
    """The mask of a box, at image resolution. `predicted_iou`: the model's own estimate, if it makes one; `stability`:
    IoU of the masks at a higher and a lower threshold."""

    mask: RLE
    predicted_iou: float | None
    stability: float


@dataclass(frozen=True)
class Detection:
    """A box for a phrase. `phrase`: its index among the phrases asked for. Scores are probabilities: `score` is that of
    the best token of any phrase, `text_score` the mean over the phrase's own tokens, `rival_score` that of the best
    token of another phrase, None for a model that is asked about each by itself. `segment`: its mask, of a model that
    gives both."""

    phrase: int
    box: Box
    score: float
    text_score: float
    rival_score: float | None
    segment: Segment | None = None


@dataclass(frozen=True)
class Grounding:
    """What was found in an image, the best score first. `left_out`: indexes of the phrases that were not asked for,
    because the model's prompt had no room for them."""

    detections: tuple[Detection, ...]
    left_out: tuple[int, ...]


@dataclass(frozen=True)
class Unanswered:
    """An image for which a server has no answer. `detail`: why; `may_pass`: whether asking again later could help."""

    detail: str
    may_pass: bool


class ImageClassifier(Protocol):
    """`labels`: what an image can be. `independent`: it can be several of them, else it is one."""

    labels: tuple[str, ...]
    independent: bool

    def __call__(self, images: Sequence[Pixels]) -> NDArray[np.float32]:
        """(B, L) probabilities, by image and label."""


class Captioner(Protocol):
    """Images in words."""

    def __call__(self, images: Sequence[Pixels]) -> Sequence[str | Unanswered]:
        """`images`: B of any sizes. Returns B captions, each on one line."""


class NounTagger(Protocol):
    """The nouns of captions."""

    def __call__(self, captions: Sequence[str]) -> list[tuple[Tag, ...]]:
        """`captions`: B. Returns B tuples of nouns, each in the order of its caption, with spans of its characters."""


class Grounder(Protocol):
    """Boxes for phrases."""

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that an image takes up in a batch. Images of one padded size may share a batch."""

    def __call__(self, images: Sequence[Pixels], phrases: Sequence[Sequence[str]]) -> list[Grounding]:
        """`images`: B of one padded size; `phrases`: B lists, any number per image."""


class Segmenter(Protocol):
    """Masks for boxes."""

    def __call__(self, images: Sequence[Pixels], boxes: Sequence[Sequence[Box]]) -> list[list[Segment]]:
        """`images`: B of any sizes; `boxes`: B lists, any number per image. Returns B lists, one segment per box, in
        order."""
