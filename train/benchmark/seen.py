"""A picture as the backbones see it, whole and with its subject cut out, and how it resembles photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from model import Subject, prepare_reference
from train.benchmark.backbones import Backbone, PatchBackbone, Patches
from train.benchmark.faces import Faces
from train.benchmark.protocol import Box
from train.benchmark.scores import Mask, copy_paste, cosines, margin, masked_max_cosine, patch_mask
from train.evaluation.metrics import Locator

METRIC = {"dino": "dino", "dinov2": "dinov2", "clip": "clip_i"}
"""What the similarity of pictures by a backbone is called."""
CUTOUT_PX = 256
EVERYWHERE: Box = (0, 0, 1, 1)


@dataclass(frozen=True)
class Seen:
    """A picture of a subject. whole, apart: by role, (D,) of length 1; apart is of the subject cut out, on white."""

    whole: Mapping[str, Tensor]
    apart: Mapping[str, Tensor] = field(default_factory=dict)
    patches: Patches | None = None
    foreground: Mask | None = None
    """(h · w,) bool: the patches of the subject."""
    found: bool | None = None
    """Whether the subject was found; None where nobody looked. A subject that was not found is the whole picture."""
    face: Tensor | None = None
    """(512,) of length 1, or zeros where there is no face; None where nobody looked."""


@dataclass(frozen=True)
class Picture:
    """What is to be seen: a picture, a caption with the subject's noun, and where the subject is looked for."""

    image: Image.Image
    caption: str
    noun: str
    box: Box | None = None
    """The picture is judged inside it; None: as a whole."""


@dataclass(frozen=True)
class Viewer:
    """locate: finds subjects, so that they can be cut out; None: nothing is cut out, and there are no masked scores."""

    backbones: Mapping[str, Backbone]
    patches: PatchBackbone | None = None
    locate: Locator | None = None
    faces: Faces | None = None

    def identity(self) -> dict[str, Any]:
        """The backbones as a result records them, by role."""
        every: dict[str, Backbone | PatchBackbone | Faces] = dict(self.backbones)
        every |= {b.role: b for b in (self.patches, self.faces) if b is not None}
        return {role: backbone.identity() for role, backbone in every.items()}

    def mask(self, picture: Picture) -> Mask | None:
        """(H, W) bool: where the picture shows its subject; None: it is not found, or nobody looks."""
        if self.locate is None:
            return None
        sought = Subject(picture.image, picture.noun, box=picture.box or EVERYWHERE)
        return self.locate(picture.image, picture.caption, [sought])[0]

    def see(self, pictures: Sequence[Picture]) -> list[Seen]:
        """In their order."""
        masks = [self.mask(p) for p in pictures]
        crops = [_crop(p.image, p.box) for p in pictures]
        inside = [_crop_mask(m, p.box) for m, p in zip(masks, pictures, strict=True)]
        whole = {role: b.images(crops) for role, b in self.backbones.items()}
        apart: dict[str, Tensor] = {}
        if self.locate is not None:
            cut = [prepare_reference(c, m, CUTOUT_PX) for c, m in zip(crops, inside, strict=True)]
            apart = {role: b.images(cut) for role, b in self.backbones.items()}
        patches = self.patches.patches(crops) if self.patches is not None else None
        faces = self.faces.images(crops) if self.faces is not None else None
        return [
            Seen(
                {role: found[i] for role, found in whole.items()},
                {role: found[i] for role, found in apart.items()},
                patches[i] if patches else None,
                _foreground(inside[i], patches[i]) if patches else None,
                None if self.locate is None else inside[i] is not None,
                None if faces is None else faces[i],
            )
            for i in range(len(pictures))
        ]


@dataclass(frozen=True)
class Truth:
    """What a picture of a subject is judged by."""

    against: Sequence[Seen]
    """The photographs that it is compared with, by the pairing rule."""
    shown: Seen
    """The reference that the model was given."""
    others: Sequence[Seen]
    """The subject's other photographs: another pose, another background."""
    look_alikes: Sequence[Sequence[Seen]]
    """Photographs of each other subject of the same noun, by the pairing rule."""


def resemblance(seen: Seen, truth: Truth) -> dict[str, list[float]]:
    """The values of each measure that can be had, by name. `_margin`: lead over look-alikes; `_copy`: copy-paste;
    `_apart`: what is left of the similarity when pose and background are held apart: cut-outs, compared with the
    photographs that were not shown."""
    found: dict[str, list[float]] = {}
    for role, own in seen.whole.items():
        name = METRIC[role]
        found[name] = cosines(own, [p.whole[role] for p in truth.against])
        if truth.look_alikes:
            theirs = [cosines(own, [p.whole[role] for p in other]) for other in truth.look_alikes]
            found[f"{name}_margin"] = [margin(found[name], theirs)]
        if truth.others and seen is not truth.shown:
            others = [p.whole[role] for p in truth.others]
            found[f"{name}_copy"] = [copy_paste(own, truth.shown.whole[role], others)]
        if truth.others and seen.apart:
            found[f"{name}_apart"] = cosines(seen.apart[role], [p.apart[role] for p in truth.others])
    if seen.patches is not None:
        found["masc"] = _masc(seen.patches, truth.against)
        if truth.look_alikes:
            found["masc_margin"] = [margin(found["masc"], [_masc(seen.patches, o) for o in truth.look_alikes])]
    if seen.face is not None:
        faces = [p.face for p in truth.against if p.face is not None]
        found["face"] = cosines(seen.face, faces)
    if seen.found is not None:
        found["found"] = [float(seen.found)]
    return found


def _masc(patches: Patches, photographs: Sequence[Seen]) -> list[float]:
    values = []
    for photograph in photographs:
        assert photograph.patches is not None and photograph.foreground is not None
        values.append(masked_max_cosine(photograph.patches.features, photograph.foreground, patches.features))
    return values


def _foreground(mask: Mask | None, patches: Patches) -> Mask:
    if mask is None:
        return np.ones(len(patches.features), bool)
    return patch_mask(mask, patches.grid)


def _pixels(size: tuple[int, int], box: Box) -> tuple[int, int, int, int]:
    """At least one pixel."""
    x1, y1, x2, y2 = (round(v * side) for v, side in zip(box, size * 2, strict=True))
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def _crop(image: Image.Image, box: Box | None) -> Image.Image:
    return image if box is None else image.crop(_pixels(image.size, box))


def _crop_mask(mask: Mask | None, box: Box | None) -> Mask | None:
    if mask is None or box is None:
        return mask
    x1, y1, x2, y2 = _pixels((mask.shape[1], mask.shape[0]), box)
    part = mask[y1:y2, x1:x2]
    return part if part.any() else None
