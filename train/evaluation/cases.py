"""A dataset's images as tasks for the pipeline: their captions for prompts, their subjects for references."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from model import Subject
from model.mention import mentions
from subject_diffusion.errors import RunError
from train.stream.dataset import CACHE, Stream
from train.stream.filter import Filter
from train.stream.source import Source
from train.stream.transform import SubjectBatch, SubjectTransform
from train.trainer.recipe import ExampleSettings


@dataclass(frozen=True)
class Case:
    """A square of an image, what it shows, and its subjects, each with its mask and box there."""

    image: Image.Image
    caption: str
    subjects: tuple[Subject, ...]


def load_cases(
    path: str,
    count: int,
    examples: ExampleSettings,
    subjects: tuple[int, int],
    cache: Path = CACHE,
    tags: frozenset[str] | None = None,
) -> list[Case]:
    """As `find_cases`. Raises RunError when there are fewer images."""
    cases = find_cases(path, count, examples, subjects, cache, tags)
    if len(cases) < count:
        raise RunError(f"{path}: {len(cases)} of its images show {subjects[0]} subject(s) or more; {count} are needed")
    return cases


def find_cases(
    path: str,
    count: int,
    examples: ExampleSettings,
    subjects: tuple[int, int],
    cache: Path = CACHE,
    tags: frozenset[str] | None = None,
) -> list[Case]:
    """The first images of a dataset that have enough subjects, up to `count`. subjects: the fewest, and the most that
    are taken; tags: of them, if not all."""
    fewest, most = subjects
    transform = SubjectTransform(size_px=examples.size_px, max_subjects=most, min_visible=examples.min_visible)
    source = Source(path, keep=Filter(min_entities=fewest, tags=tags))
    stream: Stream[SubjectBatch] = Stream([source], 1, transform, mode="evaluate", rank=0, ranks=1, cache=cache)
    cases: list[Case] = []
    for batch in stream:
        pixels, caption = batch["image"][0], batch["caption"][0]
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        parts = zip(batch["tags"][0], batch["boxes"][0], batch["masks"][0], strict=True)
        cast = tuple(_subject(image, *part) for part in parts if mentions(caption, part[0]) and part[2].any())
        if len(cast) >= fewest:
            cases.append(Case(image, caption, cast))
        if len(cases) == count:
            break
    return cases


def _subject(image: Image.Image, tag: str, box: Tensor, mask: Tensor) -> Subject:
    x1, y1, x2, y2 = box.tolist()
    return Subject(image, tag, mask=np.asarray(mask), box=(x1, y1, x2, y2))
