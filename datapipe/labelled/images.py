"""What every format of labels says of an image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datapipe.errors import SourceError
from datapipe.schema import RLE


@dataclass(frozen=True)
class LabelledObject:
    """`name`: of its category, as a caption would say it; `box`: x1, y1, x2, y2 as fractions of width and height."""

    name: str
    box: tuple[float, float, float, float]
    mask: RLE | None = None


@dataclass(frozen=True)
class LabelledImage:
    """`size_px`: width and height that the labels are of, where they say; `captions`: that people wrote, if any did."""

    path: Path
    objects: tuple[LabelledObject, ...]
    size_px: tuple[int, int] | None = None
    captions: Sequence[str] = ()
    url: str = ""
    licence: str = ""


def path_in(folder: Path, name: str) -> Path:
    """Of an image that labels name. Labels are other people's: raises SourceError for a name that leads elsewhere."""
    path = Path(os.path.abspath(folder / name))
    if not path.is_relative_to(os.path.abspath(folder)):
        raise SourceError(f"{name}: the labels name an image outside of {folder}")
    return path


def digest_of(files: Iterable[Path]) -> str:
    """A hash of what the files of labels say. Raises SourceError."""
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
