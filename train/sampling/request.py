"""What a user asks to be drawn: from the words of the command line, or a line of a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import Field, field_validator

from subject_diffusion.errors import RecipeError, RunError
from subject_diffusion.settings import Settings, validated
from train.sampling.settings import MAX_SEED, Axis

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""x1, y1, x2, y2."""
Found = TypeVar("Found")


class Reference(Settings):
    """A picture of a subject."""

    image: str
    """Its file."""
    mask: str | None = None
    """File of a mask, white where the subject is."""
    at: Point | Box | None = None
    """A point of the subject or its box, 0..1 of the picture's width and height, to cut it out by."""

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> Reference:
        if self.mask is not None and self.at is not None:
            raise ValueError(f"{self.image}: a mask and a place to cut it out by; give one of them")
        if self.at is not None and not all(0 <= v <= 1 for v in self.at):
            raise ValueError(f"{self.image}: {self.at} lies not inside the picture; give fractions from 0 to 1")
        if self.at is not None and len(self.at) == 4 and not (self.at[0] < self.at[2] and self.at[1] < self.at[3]):
            raise ValueError(f"{self.image}: {self.at} is no box; it is x1,y1,x2,y2 with x1 < x2 and y1 < y2")
        return self


class AskedSubject(Settings):
    """A subject, in one reference or several."""

    tag: str = Field(min_length=1)
    """What the prompt calls it. Two subjects may have one tag."""
    references: tuple[Reference, ...] = Field(min_length=1)
    """Its pictures: file names, or objects with image, mask, at."""
    box: Box | None = None
    """Where it is drawn, 0..1 of the new picture."""

    @field_validator("references", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        given = [given] if isinstance(given, str | dict) else given
        return [{"image": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given

    @field_validator("box")
    @classmethod
    def _inside(cls, box: Box | None) -> Box | None:
        if box and not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(
                f"{box} lies not inside the image; it is x1, y1, x2, y2 with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1"
            )
        return box


class Request(Settings):
    """A prompt with its subjects: one line of a file of prompts."""

    prompt: str
    subjects: tuple[AskedSubject, ...] = ()
    name: str = Field("", pattern=r"^[\w.-]*$")
    """First part of the pictures' names."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """The first picture's seed; each further one has the next."""
    images: int = Field(1, ge=1, le=MAX_SEED)
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    settings: dict[str, float] = Field({})
    """Changes to SamplingSettings."""

    @pydantic.model_validator(mode="after")
    def _seeds(self) -> Request:
        if self.seed + self.images - 1 > MAX_SEED:
            raise ValueError(f"seed {self.seed} and {self.images} images: seeds end at {MAX_SEED}")
        return self

    def files(self) -> Iterable[Reference]:
        return (reference for subject in self.subjects for reference in subject.references)


def read_requests(path: Path, common: dict[str, Any]) -> list[Request]:
    """The lines of a JSON-lines file; common: keys for all lines that do not have their own. Files of pictures are
    named from the file's folder. Raises RunError that names the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not a text that can be read ({getattr(error, 'strerror', 'not UTF-8')})") from None
    found: list[Request] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            tree = pydantic.TypeAdapter(dict[str, Any]).validate_json(line)
        except pydantic.ValidationError as error:
            raise RunError(f"{where}: {error.errors()[0]['msg']}; each line is a JSON object") from None
        settings = common.get("settings", {}) | tree["settings"] if isinstance(tree.get("settings"), dict) else None
        try:
            request = validated(
                Request, common | tree | ({"settings": settings} if settings is not None else {}), (), where
            )
        except RecipeError as error:
            raise RunError(str(error)) from None
        found.append(_from_folder(request, path.parent, f"{number:04d}"))
    if not found:
        raise RunError(f"{path}: no prompts; write a JSON object on each line")
    names = [request.name for request in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RunError(f"{path}: two lines are called {twice}; give each a name of its own")
    return found


def _from_folder(request: Request, folder: Path, name: str) -> Request:
    def there(reference: Reference) -> Reference:
        mask = None if reference.mask is None else str(folder / reference.mask)
        return reference.model_copy(update={"image": str(folder / reference.image), "mask": mask})

    subjects = tuple(
        subject.model_copy(update={"references": tuple(map(there, subject.references))}) for subject in request.subjects
    )
    return request.model_copy(update={"subjects": subjects, "name": request.name or name})


def asked_subjects(
    subjects: Sequence[str], masks: Sequence[str], places: Sequence[str], boxes: Sequence[str]
) -> tuple[AskedSubject, ...]:
    """From the options of the command line, each TAG=VALUE: the first --box mug=… is that of the first --subject
    mug=…, the second that of the second. Raises RunError."""
    pictures = [(tag, value.split(",")) for tag, value in _pairs("--subject", subjects, "photo.png")]
    tags = [tag for tag, _ in pictures]
    masked = _by_subject("--mask", masks, "mask.png", tags, lambda text: text.split(","))
    cut = _by_subject("--at", places, "0.5,0.4", tags, _places)
    placed = _by_subject("--box", boxes, "0.1,0.4,0.5,0.9", tags, lambda text: _numbers("--box", text, (4,)))
    found = []
    for k, (tag, files) in enumerate(pictures):
        references = [
            {"image": file, "mask": mask or None, "at": at}
            for file, mask, at in zip(
                files,
                _one_each("--mask", tag, masked[k], len(files), ","),
                _one_each("--at", tag, cut[k], len(files), ";"),
                strict=True,
            )
        ]
        tree = {"tag": tag, "references": references, "box": placed[k]}
        try:
            found.append(validated(AskedSubject, tree, (), f"--subject {tag}"))
        except RecipeError as error:
            raise RunError(str(error)) from None
    return tuple(found)


def _places(text: str) -> list[tuple[float, ...] | None]:
    return [_numbers("--at", place, (2, 4)) if place else None for place in text.split(";")]


def _pairs(option: str, given: Sequence[str], example: str) -> list[tuple[str, str]]:
    found = []
    for text in given:
        tag, _, value = text.partition("=")
        if not tag.strip() or not value:
            raise RunError(f"{option} {text}: write the tag, = and the value, as in {option} mug={example}")
        found.append((tag.strip(), value))
    return found


def _by_subject(
    option: str, given: Sequence[str], example: str, tags: Sequence[str], read: Callable[[str], Found]
) -> list[Found | None]:
    """For each subject the value of its tag that is its own."""
    found: list[Found | None] = [None] * len(tags)
    free = list(range(len(tags)))
    for tag, value in _pairs(option, given, example):
        if tag not in tags:
            raise RunError(f"{option} {tag}={value}: no --subject is called {tag}")
        own = next((k for k in free if tags[k] == tag), None)
        if own is None:
            raise RunError(f"{option} {tag}={value}: more of them than there are subjects called {tag}")
        free.remove(own)
        found[own] = read(value)
    return found


def _one_each(option: str, tag: str, given: Sequence[Any] | None, count: int, between: Literal[",", ";"]) -> list[Any]:
    """A value for each reference of a subject."""
    if given is None:
        return [None] * count
    if len(given) != count:
        raise RunError(f"{option} {tag}: {len(given)} for {count} references; give one each, with {between} between")
    return list(given)


def _numbers(option: str, text: str, counts: Sequence[int]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(side) for side in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts:
        words = {2: "two", 4: "four"}
        example = {2: "0.5,0.4", 4: "0.1,0.4,0.5,0.9"}[counts[0]]
        raise RunError(
            f"{option} {text}: write {' or '.join(words[n] for n in counts)} numbers, as in {option} mug={example}"
        )
    return numbers


def axis(text: str) -> Axis:
    """`guidance_scale=3,5,7.5` of `--grid`. Raises RunError."""
    key, _, values = text.partition("=")
    try:
        found = tuple(float(value) for value in re.split(r"\s*,\s*", values.strip()))
    except ValueError:
        raise RunError(f"--grid {text}: write a setting, = and numbers, as in --grid guidance_scale=3,5,7.5") from None
    return key.strip(), found
