"""The pictures of a benchmark, scored; and beside them what the scores can be read by: real photographs, and copies of
the reference."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from rich.progress import track

from subject_diffusion.packaged import local_path
from train.benchmark.protocol import Item, Protocol, Reference
from train.benchmark.seen import EVERYWHERE, Picture, Seen, Truth, Viewer, resemblance
from train.evaluation.pictures import open_picture

Pairing = Literal["all", "reference"]
"""What a picture is compared with: all photographs of its subject, as in DreamBooth, or the reference alone."""
TEXT = "clip_t"
_MEASURING = (
    "train/benchmark/backbones.py",
    "train/benchmark/dreambench.py",
    "train/benchmark/faces.py",
    "train/benchmark/humans.py",
    "train/benchmark/measure.py",
    "train/benchmark/protocol.py",
    "train/benchmark/scores.py",
    "train/benchmark/seen.py",
    "train/evaluation/metrics.py",
    "model/reference.py",
)
TOGETHER = 16


@dataclass(frozen=True)
class Scored:
    """A picture's values. by_subject: in the order of its references, by measure; text: cosine of CLIP's embeddings of
    picture and prompt (CLIP-T), None without a CLIP."""

    item: Item
    by_subject: tuple[dict[str, list[float]], ...]
    text: float | None


@dataclass(frozen=True)
class Measured:
    """pictures: those of the model; ceiling: photographs in place of pictures; copied: references in place of them."""

    pictures: list[Scored]
    ceiling: list[Scored]
    copied: list[Scored]


class Measuring:
    """Scores pictures of a protocol."""

    def __init__(self, protocol: Protocol, viewer: Viewer, pairing: Pairing) -> None:
        """Sees all photographs that are needed."""
        self._protocol, self._viewer, self._pairing = protocol, viewer, pairing
        self._shown = {r.subject: r for item in protocol.items for r in item.references}
        names = dict.fromkeys(self._shown)
        names |= dict.fromkeys(other.name for name in self._shown for other in protocol.look_alikes(name))
        self._photographs = {
            name: dict(zip(protocol.subjects[name].photographs, self._see_photographs(name), strict=True))
            for name in track(names, "seeing the photographs", transient=True)
        }

    def measure(self, picture_of: Callable[[Item], Image.Image]) -> Measured:
        """picture_of: what was drawn for an item."""
        items = self._protocol.items
        pictures = []
        for start in track(range(0, len(items), TOGETHER), f"scoring, {len(items):,} pictures", transient=True):
            some = items[start : start + TOGETHER]
            pictures += self._score([(item, picture_of(item)) for item in some])
        return Measured(pictures, list(self._ceiling()), list(self._copied()))

    def _score(self, drawn: Sequence[tuple[Item, Image.Image]]) -> list[Scored]:
        asked = [(item, image, r) for item, image in drawn for r in item.references]
        seen = iter(self._viewer.see([self._picture(item.text, image, r) for item, image, r in asked]))
        by_subject = [tuple((r, next(seen)) for r in item.references) for item, _ in drawn]
        texts = self._texts(drawn)
        return [
            Scored(item, tuple(resemblance(s, self._truth(r)) for r, s in found), text)
            for (item, _), found, text in zip(drawn, by_subject, texts, strict=True)
        ]

    def _picture(self, caption: str, image: Image.Image, reference: Reference) -> Picture:
        return Picture(image, caption, self._protocol.subjects[reference.subject].noun, reference.box)

    def _texts(self, drawn: Sequence[tuple[Item, Image.Image]]) -> list[float | None]:
        clip = self._viewer.backbones.get("clip")
        if clip is None:
            return [None] * len(drawn)
        pictures, texts = clip.images([image for _, image in drawn]), clip.texts([item.text for item, _ in drawn])
        return [float(cosine) for cosine in (pictures * texts).sum(dim=1)]

    def _see_photographs(self, name: str) -> list[Seen]:
        subject = self._protocol.subjects[name]
        caption = f"a photo of a {subject.noun}"
        return self._viewer.see([Picture(_open(p), caption, subject.noun) for p in subject.photographs])

    def _truth(self, reference: Reference, besides: Path | None = None) -> Truth:
        """besides: a photograph that is judged itself, and not compared with."""
        own = self._photographs[reference.subject]
        shown = own[reference.photograph]
        kept = {path: seen for path, seen in own.items() if path != besides}
        against = list(kept.values()) if self._pairing == "all" else [s for s in kept.values() if s is shown]
        theirs = [list(self._photographs[o.name].values()) for o in self._protocol.look_alikes(reference.subject)]
        return Truth(
            against,
            shown,
            [s for s in kept.values() if s is not shown],
            theirs if self._pairing == "all" else [photographs[:1] for photographs in theirs],
        )

    def _ceiling(self) -> Iterator[Scored]:
        """Every photograph of each subject that is drawn, judged by the others."""
        for name, reference in self._shown.items():
            for number, (path, seen) in enumerate(self._photographs[name].items()):
                truth = self._truth(reference, besides=path)
                if truth.against:
                    item = Item(name, 0, "", "", number, (Reference(name, path),))
                    yield Scored(item, (resemblance(seen, truth),), None)

    def _copied(self) -> Iterator[Scored]:
        """The references themselves, each in its box, in place of what each prompt asks for."""
        first = [item for item in self._protocol.items if item.index == 0]
        for references in dict.fromkeys(item.references for item in first):
            alike = [item for item in first if item.references == references]
            image = _pasted(references)
            (scored,) = self._score([(alike[0], image)])
            texts = self._texts([(item, image) for item in alike])
            for item, text in zip(alike, texts, strict=True):
                yield Scored(item, scored.by_subject, text)


@functools.cache
def measuring_code() -> str:
    """The first digits of the SHA-256 of the code that decides scores: two results are alike only where it is."""
    digest = hashlib.sha256()
    for name in _MEASURING:
        digest.update(local_path(name).read_bytes())
    return digest.hexdigest()[:16]


def _open(path: Path) -> Image.Image:
    return open_picture(path).convert("RGB")


def _pasted(references: Sequence[Reference]) -> Image.Image:
    """One reference without a box: its photograph; else each in its box, on white."""
    if len(references) == 1 and references[0].box is None:
        return _open(references[0].photograph)
    side = 512
    canvas = Image.new("RGB", (side, side), "white")
    for reference in references:
        x1, y1, x2, y2 = (round(v * side) for v in reference.box or EVERYWHERE)
        photograph = _open(reference.photograph)
        scale = min((x2 - x1) / photograph.width, (y2 - y1) / photograph.height)
        fitted = photograph.resize((max(1, int(photograph.width * scale)), max(1, int(photograph.height * scale))))
        canvas.paste(fitted, ((x1 + x2 - fitted.width) // 2, (y1 + y2 - fitted.height) // 2))
    return canvas
