"""A subject as the user gives it, and its place in the image if the user names none."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.errors import ModelError
from model.reference import (
    Mask,
    extent,
    looks_inverted,
    prepare_reference,
    read_mask,
    read_picture,
    reference_tensor,
)
from model.reference_background import ReferenceBackground

Picture = Image.Image | NDArray[Any] | str | Path
"""An image, the path of one, or its pixels."""
Box = tuple[float, float, float, float]
"""x1, y1, x2, y2, 0..1 of the image's width and height."""

LARGEST_OWN_BOX = 0.7
"""A larger share of the image than this no subject of the dataset has [released code]: a reference that fills its own
picture does not tell where it should go."""
SHARE_OF_CELL = 0.8
"""Share of the room laid out for a subject that the longer side of its box takes."""
SMALLEST_ROOM = 0.1
"""Share of the image's sides; less is no room for a subject."""


@dataclass(frozen=True)
class Subject:
    """One subject to draw. The prompt must contain its tag."""

    image: Picture | Sequence[Picture]
    """A picture that shows it: an image, the path of one, or (height, width, 3 or 4), uint8 or float in 0..1. Or a list
    of several, its references from other sides, of which the first gives its shape.

    The model was trained with one reference for each subject, so several enter as one: their class embeddings are
    averaged into the subject's one word, whose MLP begins with a normalization; and the adapters attend to the patches
    of all, a patch of n references counting for 1/n. A subject then weighs as much as with one reference, each place of
    the image still picks the patch that fits it (a mean of patches would blur the poses), and the same reference twice
    is that reference once."""
    tag: str
    """What the prompt calls it: "mug", "toy robot"."""
    mask: Picture | Sequence[Picture | None] | None = None
    """Where in the picture it is: (height, width), bool, uint8 or float in 0..1, or an image, or the path of one, whose
    white is the subject; gray is cut at half. None: where the picture is opaque. A list where `image` is one."""
    box: Box | None = None
    """Where it is to be drawn, xyxy, 0..1 of the new image. None: where its mask has it in its own picture, if that
    leaves the others their room, else wherever there is room."""

    def __post_init__(self) -> None:
        name = f"image of the {self.tag}"
        if not isinstance(self.image, list | tuple):
            object.__setattr__(self, "image", read_picture(cast(Picture, self.image), name))
            return
        if not self.image:
            raise ModelError(f"{name}: the list is empty; give one picture at least")
        if self.mask is not None and not (isinstance(self.mask, list | tuple) and len(self.mask) == len(self.image)):
            raise ModelError(f"mask of the {self.tag}: with a list of images, give a list of as many masks")
        object.__setattr__(self, "image", tuple(read_picture(picture, name) for picture in self.image))

    @property
    def picture(self) -> Image.Image:
        """`image`, the first of several, as an image, whatever it was given as."""
        picture: Any = self.image
        return cast(Image.Image, picture[0] if isinstance(picture, tuple) else picture)

    def references(self) -> list[Subject]:
        """The subject in each of its pictures alone."""
        if not isinstance(self.image, tuple):
            return [self]
        masks: Any = self.mask or [None] * len(self.image)
        return [replace(self, image=image, mask=mask) for image, mask in zip(self.image, masks, strict=True)]

    def mask_array(self) -> Mask | None:
        """The mask of `picture`: (H, W) bool; None: everywhere. Raises ModelError for another kind, or an empty one."""
        if isinstance(self.image, tuple):
            return self.references()[0].mask_array()
        if self.mask is not None:
            mask = read_mask(cast(Picture, self.mask), f"mask of the {self.tag}")
        elif self.picture.has_transparency_data:
            mask = np.asarray(self.picture.convert("RGBA"))[..., 3] >= 128
        else:
            return None
        if not mask.any():
            raise ModelError(f"mask of the {self.tag}: it is empty; it must be true where the {self.tag} is")
        if looks_inverted(mask):
            warnings.warn(
                f"mask of the {self.tag}: it has the picture's rim and not its middle; is it inverted?", stacklevel=2
            )
        return mask


def place(subjects: Sequence[Subject], height: int, width: int) -> list[Box]:
    """A box for every subject in an image of (height, width) pixels: the user's, else that of its own mask, else one
    laid out so that it overlaps no other. Deterministic. Raises ModelError for a box outside the image, and when there
    is no room."""
    given = {k: _checked(s.box, s.tag) for k, s in enumerate(subjects) if s.box is not None}
    with_own = dict(given)
    for k, subject in enumerate(subjects):
        own = None if k in given else _own_box(subject)
        if own is not None and not any(_overlap(own, other) for other in with_own.values()):
            with_own[k] = own
    for settled in (with_own, given):
        rest = [k for k in range(len(subjects)) if k not in settled]
        if not rest:
            return [settled[k] for k in range(len(subjects))]
        room = _largest_room(list(settled.values()), width / height)
        if min(room[2] - room[0], room[3] - room[1]) >= SMALLEST_ROOM:
            cells = _cells(room, len(rest), width / height)
            shapes = [_aspect(subjects[k]) * height / width for k in rest]
            laid_out = {k: _fit(cell, shape) for k, cell, shape in zip(rest, cells, shapes, strict=True)}
            return [(settled | laid_out)[k] for k in range(len(subjects))]
    raise ModelError(f"no room is left for the {subjects[rest[0]].tag}: give it a box, or the others smaller ones")


def stack_subjects(
    casts: Sequence[Sequence[Subject]],
    size: tuple[int, int],
    side: int,
    background: ReferenceBackground,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model is told of each prompt's subjects, in as many slots K as the fullest prompt needs, at least one.

    size: (height, width) of the images to draw, pixels; side: of the references. Returns references
    (B, K, n, 3, side, side) uint8, n the most that a subject has; boxes (B, K, 4) float32 xyxy 0..1; shares (B, K, n)
    float32, what each reference counts for: 1 over the number of its subject's, 0 where there is none. Raises
    ModelError.
    """
    slots = max([1, *(len(subjects) for subjects in casts)])
    each = [[subject.references() for subject in subjects] for subjects in casts]
    most = max([1, *(len(references) for subjects in each for references in subjects)])
    references = torch.zeros(len(casts), slots, most, 3, side, side, dtype=torch.uint8)
    boxes, shares = torch.zeros(len(casts), slots, 4), torch.zeros(len(casts), slots, most)
    for b, subjects in enumerate(casts):
        for k, (pictures, box) in enumerate(zip(each[b], place(subjects, *size), strict=True)):
            for n, shown in enumerate(pictures):
                reference = prepare_reference(shown.picture, shown.mask_array(), side, background=background)
                references[b, k, n] = reference_tensor(reference)
            boxes[b, k] = torch.tensor(box)
            shares[b, k, : len(pictures)] = 1 / len(pictures)
    return references, boxes, shares


def _checked(box: Box, tag: str) -> Box:
    x1, y1, x2, y2 = (float(v) for v in box)
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        raise ModelError(
            f"box of the {tag}: {tuple(box)} lies not inside the image; it is x1, y1, x2, y2 with 0 <= x1 < x2 <= 1 "
            "and 0 <= y1 < y2 <= 1"
        )
    return x1, y1, x2, y2


def _own_box(subject: Subject) -> Box | None:
    mask = subject.mask_array()
    if mask is None:
        return None
    (x1, y1, x2, y2), (height, width) = extent(mask), mask.shape
    box = (x1 / width, y1 / height, x2 / width, y2 / height)
    return box if (box[2] - box[0]) * (box[3] - box[1]) <= LARGEST_OWN_BOX else None


def _aspect(subject: Subject) -> float:
    """Width / height of the subject in its picture."""
    mask = subject.mask_array()
    x1, y1, x2, y2 = (0, 0, *subject.picture.size) if mask is None else extent(mask)
    return (x2 - x1) / (y2 - y1)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _largest_room(taken: Sequence[Box], aspect: float) -> Box:
    """The largest rectangle that overlaps no taken box; among equals the squarest, then the first from the top left; an
    empty one if there is no room."""
    xs = sorted({0.0, 1.0, *(v for box in taken for v in (box[0], box[2]))})
    ys = sorted({0.0, 1.0, *(v for box in taken for v in (box[1], box[3]))})
    rooms = [
        (x1, y1, x2, y2)
        for (y1, y2), (x1, x2) in itertools.product(itertools.combinations(ys, 2), itertools.combinations(xs, 2))
        if not any(_overlap((x1, y1, x2, y2), box) for box in taken)
    ]

    def size(room: Box) -> tuple[float, float]:
        w, h = (room[2] - room[0]) * aspect, room[3] - room[1]
        return w * h, min(w, h)

    return max(rooms, key=size, default=(0.0, 0.0, 0.0, 0.0))


def _cells(room: Box, count: int, aspect: float) -> list[Box]:
    """The room in `count` cells, as square as they come, row by row; the last row's share its width."""
    x1, y1, x2, y2 = room
    columns = max(1, min(count, round(math.sqrt(count * aspect * (x2 - x1) / (y2 - y1)))))
    rows = [min(columns, count - start) for start in range(0, count, columns)]
    high = (y2 - y1) / len(rows)
    return [
        (x1 + (x2 - x1) * i / n, y1 + high * r, x1 + (x2 - x1) * (i + 1) / n, y1 + high * (r + 1))
        for r, n in enumerate(rows)
        for i in range(n)
    ]


def _fit(cell: Box, aspect: float) -> Box:
    """The largest box of an aspect, in the cell's own units, that takes `SHARE_OF_CELL` of the cell; in its middle."""
    w, h = (cell[2] - cell[0]) * SHARE_OF_CELL, (cell[3] - cell[1]) * SHARE_OF_CELL
    w, h = min(w, h * aspect), min(h, w / aspect)
    x, y = (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2
