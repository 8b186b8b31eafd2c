"""Pictures that somebody else drew, named by a manifest: JSON lines, one for each picture, of its file, the subjects
that it shows and its prompt."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from subject_diffusion.errors import RunError
from subject_diffusion.settings import Settings
from train.benchmark.protocol import Box, Item, Protocol

Fraction = Annotated[float, Field(ge=0, le=1)]


class Line(Settings):
    """`{"file": "backpack/0.png", "subjects": ["backpack"], "prompt": "a backpack in the jungle"}`."""

    file: str
    """Below the folder of the pictures, links followed."""
    subjects: tuple[str, ...] = Field(min_length=1)
    """As the suite names them; those of a pair in its order."""
    prompt: str
    """One of the suite's for these subjects."""
    boxes: tuple[tuple[Fraction, Fraction, Fraction, Fraction], ...] | None = None
    """Where the picture shows each subject, xyxy, 0..1; default: where the suite asks for it."""


def given_pictures(manifest: Path, folder: Path, asked: Protocol) -> tuple[Protocol, dict[Item, Path]]:
    """What of the suite these pictures answer, and where each is. asked: the suite, with one picture of each prompt.
    Raises RunError, with the line's number, where one is of another form, answers nothing that is asked, or has no
    picture."""
    known = {(item.group, item.text): item for item in asked.items}
    seen: Counter[tuple[str, str]] = Counter()
    found: dict[Item, Path] = {}
    for number, text in _lines(manifest):
        line = _parse(text, f"{manifest}, line {number}")
        key = "+".join(line.subjects), line.prompt
        if key not in known:
            raise RunError(f"{manifest}, line {number}: {asked.suite} has no {key[0]} with the prompt {key[1]!r}")
        path = folder / line.file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(
                f"{manifest}, line {number}: {line.file} lies outside of {folder}; name the folder of them all"
            )
        if not path.is_file():
            raise RunError(f"{manifest}, line {number}: {path} is not there")
        references = known[key].references
        if line.boxes is not None:
            if len(line.boxes) != len(references) or not all(_has_area(box) for box in line.boxes):
                raise RunError(f"{manifest}, line {number}: a box for each subject is wanted, x1 < x2 and y1 < y2")
            references = tuple(dataclasses.replace(r, box=box) for r, box in zip(references, line.boxes, strict=True))
        found[dataclasses.replace(known[key], index=seen[key], references=references)] = path
        seen[key] += 1
    if not found:
        raise RunError(f"{manifest}: it names no pictures")
    places = {key: place for place, key in enumerate(known)}
    items = sorted(found, key=lambda item: (places[item.group, item.text], item.index))
    return Protocol(asked.suite, asked.subjects, tuple(items)), found


def _lines(manifest: Path) -> list[tuple[int, str]]:
    """Those that are not blank, with their numbers."""
    try:
        lines = enumerate(manifest.read_text("utf-8").split("\n"), 1)
        return [(number, line) for number, line in lines if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise RunError(f"{manifest}: no manifest that can be read; it is JSON lines") from None


def _parse(text: str, where: str) -> Line:
    try:
        return Line.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{where}: {key + ': ' if key else ''}{first['msg'][0].lower() + first['msg'][1:]}") from None


def _has_area(box: Box) -> bool:
    return box[0] < box[2] and box[1] < box[3]
