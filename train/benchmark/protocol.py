"""What a benchmark asks for: subjects with their photographs, and every picture to draw, with a seed of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subject_diffusion.errors import RunError

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2, 0..1 of the picture."""


@dataclass(frozen=True)
class Photographed:
    """A subject of the benchmark, whose photographs are the truth."""

    name: str
    noun: str
    photographs: tuple[Path, ...]


@dataclass(frozen=True)
class Reference:
    """What a model is shown of a subject."""

    subject: str
    photograph: Path
    box: Box | None = None
    """Where it is to be drawn, and where it is scored; None: wherever the model likes, and in the whole picture."""


@dataclass(frozen=True)
class Item:
    """One picture to draw."""

    group: str
    """The subject's name, or those of a pair."""
    prompt: int
    template: str
    """The prompt with {} for the subject, by which pictures of several subjects are alike."""
    text: str
    index: int
    references: tuple[Reference, ...]

    @property
    def file(self) -> str:
        return f"{self.group}/{self.prompt:02d}-{self.index}.png"

    def seed(self, seed: int) -> int:
        """From the subject, the prompt and the index alone, whatever else is drawn. seed: of the whole evaluation."""
        named = "\0".join([str(seed), self.group, self.text, str(self.index)])
        return int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Protocol:
    """A benchmark, or the part of it that is asked for."""

    suite: str
    subjects: Mapping[str, Photographed]
    items: tuple[Item, ...]

    def look_alikes(self, name: str) -> list[Photographed]:
        """The other subjects of the same noun: what the right one must be told from."""
        own = self.subjects[name]
        return [s for s in self.subjects.values() if s.noun == own.noun and s.name != name]

    def identity(self) -> dict[str, Any]:
        """All of it that scores depend on, as JSON: photographs by the hash of their bytes. In which boxes a
        picture shows its subjects is its own affair."""
        asked = [
            [item.file, item.text, [(r.subject, r.photograph.name) for r in item.references]] for item in self.items
        ]
        return {
            "suite": self.suite,
            "subjects": sorted({r.subject for item in self.items for r in item.references}),
            "groups": sorted({item.group for item in self.items}),
            "prompts": len({(item.group, item.prompt) for item in self.items}),
            "images_per_prompt": 1 + max(item.index for item in self.items),
            "asked": _digest(repr(asked).encode()),
            "photographs": {
                s.name: _digest(*(p.name.encode() + b"\0" + p.read_bytes() for p in s.photographs))
                for s in self.subjects.values()
            },
        }


def chosen(known: Iterable[str], asked: Sequence[str], what: str) -> list[str]:
    """Those asked for, in the benchmark's order; all where none is. Raises RunError."""
    known = list(known)
    for name in asked:
        if name not in known:
            raise RunError(f"--subject {name}: no {what} of that name; there are {', '.join(known)}")
    return [name for name in known if not asked or name in asked]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
