"""What every format of labels says of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datapipe.schema import RLE


@dataclass(frozen=True)
class LabelledObject:
    """`name`: of its category, as a caption would say it; `box`: x1, y1, x2, y2 as fractions of width and height."""

    name: str
    box: tuple[float, float, float, float]
    mask: RLE | None = None


@dataclass(frozen=True)
class LabelledImage:
    """`captions`: that people wrote, if any did."""

    path: Path
    objects: tuple[LabelledObject, ...]
    captions: Sequence[str] = ()
    url: str = ""
    licence: str = ""
