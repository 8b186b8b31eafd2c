"""What every format of labels says of an image."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from pycocotools import mask as coco_mask

from datapipe.schema import MAX_PIXELS, RLE
from datapipe.sources.json_stream import JsonText, elements
from datapipe.sources.scanning import shown
from subject_diffusion.errors import SourceError

PEOPLE = "people"
"""Who wrote a caption, where no model did."""

OUTSIDE = "the labels name an image outside of"
"""What is wrong with an image that is not to be looked for."""

MOST_KINDS = 100
"""Kinds of faults that are told apart."""
_LONGEST = 300
"""Characters of a kind or place that are kept."""

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2."""


@dataclass(frozen=True)
class LabeledObject:
    """`name`: the category's, as a caption would say it; `box`: x1, y1, x2, y2 as fractions of width and height;
    `span`: the characters of the image's only caption that name it, where the labels say; `where`: what to call it when
    something is wrong with it."""

    name: str
    box: Corners
    mask: RLE | None = None
    span: tuple[int, int] | None = None
    where: str = ""


@dataclass(frozen=True)
class LabeledImage:
    """`name`: as the labels have it; `size_px`: width and height that the labels are of, where they say; `captions`: of
    which one will do, and `captions_by`, who or which model wrote them; `problem`: why the image or its labels cannot
    be used, "" where they can."""

    path: Path
    name: str
    objects: tuple[LabeledObject, ...] = ()
    size_px: tuple[int, int] | None = None
    captions: Sequence[str] = ()
    captions_by: str = PEOPLE
    url: str = ""
    licence: str = ""
    problem: str = ""


@dataclass
class Faults:
    """What of some labels was left out or mended, and why: counted by kind, with the first of each kind named."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        """Labels name some kinds and places themselves, at any length: what is kept of them is bounded."""
        kind = shortened(kind)
        if kind not in self.counts and len(self.counts) >= MOST_KINDS:
            kind = "fault of another kind"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, shortened(where))

    def corrupt(self, where: str, problem: str) -> None:
        """Adds a sample that an export leaves out."""
        self.add("corrupt sample left out", f"{where}: {problem}")

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One for each kind, the commonest first."""
        kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        return [f"{self.counts[kind]:,} × {kind}; first: {self.first[kind]}" for kind in kinds]


@dataclass(frozen=True)
class Place:
    """Where an image that labels name lies, and why it cannot be taken from there, "" where it can."""

    path: Path
    problem: str = ""


def find_image(folder: Path, name: str) -> Place:
    """Labels are other people's: their names hold backslashes, URLs, and folders of another machine. What follows the
    folder's own name in them is looked for, too. A name that leads out of the folder is a problem."""
    root = Path(os.path.abspath(folder))
    tried = [Path(os.path.abspath(root / part)) for part in _spellings(name, root.name)]
    inside = [path for path in tried if path.is_relative_to(root) and path != root]
    if not inside:
        return Place(root, f"{name}: {OUTSIDE} {folder}")
    return Place(next((path for path in inside if path.is_file()), inside[0]))


def spoken(name: str) -> str:
    """A category's name as a caption would say it: `bow_(weapon)` is a bow, `Dog_house` a Dog house."""
    plain = " ".join(name.replace("_", " ").split())
    return re.sub(r"\s*\([^()]*\)$", "", plain) or plain


def polygons_mask(polygons: Sequence[Sequence[float]], width: int, height: int) -> RLE | None:
    """One mask of polygons (x1, y1, x2, y2, …) in pixels; None where none of them has three finite points. Raises
    ValueError as `check_size` does."""
    check_size(width, height)
    usable = [
        np.clip(p, 0, np.resize((width, height), len(p))).tolist()  # pycocotools walks along what lies outside, too
        for p in polygons
        if len(p) >= 6 and len(p) % 2 == 0 and all(map(math.isfinite, p))
    ]
    if not usable:
        return None
    return RLE.from_coco(coco_mask.merge(coco_mask.frPyObjects(usable, height, width)))


def check_size(width: int, height: int) -> None:
    """Raises ValueError for an image of no pixels, or of more than any that is read: labels may claim a size for which
    no memory would do."""
    if not (width > 0 and height > 0 and width * height <= MAX_PIXELS):
        raise ValueError(f"an image of {width} x {height} pixels")


def around(points: Sequence[float]) -> Corners:
    """The box of points x1, y1, x2, y2, …"""
    return min(points[0::2]), min(points[1::2]), max(points[0::2]), max(points[1::2])


def fractions(box: Corners, width: int, height: int) -> Corners:
    """A box in pixels -> as fractions of width and height."""
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def text_file(path: Path) -> str:
    """The text of a file of labels, without its byte order mark. Raises SourceError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path}: no text in UTF-8; save it as such") from None


def json_elements(path: Path) -> Iterator[tuple[str, Any]]:
    """(name of the list, element) of every element of the lists in a JSON file of labels; of a file that is one list,
    the name is "". What is held is one element. Raises SourceError."""
    try:
        with path.open("rb") as file:
            yield from shown(elements(JsonText(file, "utf-8", str(path), "save it in UTF-8")), "labels read")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None


def files_below(folder: Path, suffix: str) -> Iterator[Path]:
    """Every file below a folder whose name ends so, in no order. Links to folders are not followed. Raises
    SourceError."""
    waiting = [str(folder)]
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(inside) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.name.endswith(suffix):
                        yield Path(entry.path)
        except OSError as error:
            raise SourceError(f"{inside}: cannot be read ({error.strerror})") from None


def digest_of(files: Iterable[Path]) -> str:
    """A hash of what the files of labels say. Raises SourceError."""
    digest = hashlib.sha256()
    for path in shown(files, "files of labels read"):
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _spellings(name: str, folder_name: str) -> list[str]:
    """Paths relative to the folder that a name may mean, the likeliest first."""
    if "://" in name:
        parts = PurePosixPath(unquote(urlsplit(name).path)).parts
        return ["/".join(parts[-2:]).lstrip("/"), *parts[-1:]]
    plain = name.replace("\\", "/")
    parts = PurePosixPath(plain).parts
    after = [i + 1 for i, part in enumerate(parts[:-1]) if part == folder_name]
    return [plain, *("/".join(parts[i:]) for i in reversed(after))]
