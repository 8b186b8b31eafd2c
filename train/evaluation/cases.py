"""A dataset's images as tasks for the pipeline: their captions for prompts, their subjects for references."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image, ImageOps

from datapipe.backends.protocol import Pixels
from model import Subject
from model.mention import mentions
from model.reference import Mask, extent
from subject_diffusion.errors import RunError
from train.stream.cache import ShardCache
from train.stream.dataset import CACHE, CACHE_BYTES, Stream
from train.stream.filter import Filter
from train.stream.reader import BatchBase
from train.stream.source import Source
from train.stream.tar_sample import RawSample
from train.stream.transform import SubjectExample, SubjectTransform
from train.trainer.identities import Name, Pairs
from train.trainer.recipe import ExampleSettings
from train.trainer.references import stored_mask


@dataclass(frozen=True)
class Case:
    """A square of an image, what it shows, and its subjects, each with its box there.

    A subject's reference is another image of it, where the dataset's `identities.parquet` tells of one, so that a copy
    of the reference is no answer; else the image itself.
    """

    image: Image.Image
    caption: str
    subjects: tuple[Subject, ...]
    individuals: tuple[Name, ...]
    """Who each subject is: the same name in two cases is the same individual."""

    def first(self, subjects: int) -> Case:
        """With so many of its subjects."""
        return dataclasses.replace(self, subjects=self.subjects[:subjects], individuals=self.individuals[:subjects])


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
    source = Source(path, keep=Filter(min_entities=fewest, tags=tags))
    cut = SubjectTransform(size_px=examples.size_px, max_subjects=most, min_visible=examples.min_visible)
    transform = _CaseTransform(cut, Pairs([source], ShardCache(Path(cache).expanduser(), CACHE_BYTES)))
    stream: Stream[_CaseBatch] = Stream([source], 1, transform, mode="evaluate", rank=0, ranks=1, cache=cache)
    cases = (case for batch in stream for case in batch["case"] if len(case.subjects) >= fewest)
    return list(itertools.islice(cases, count))


class _CaseExample(TypedDict):
    case: Case


class _CaseBatch(BatchBase):
    case: list[Case]


class _CaseTransform:
    def __init__(self, cut: SubjectTransform, pairs: Pairs) -> None:
        self._cut, self._pairs = cut, pairs

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> _CaseExample:
        cut = self._cut(raw, rng)
        image = Image.fromarray(cut["image"].transpose(1, 2, 0))
        named = list(self._named(raw, cut, rng))
        return {"case": Case(image, cut["caption"], tuple(s for s, _ in named), tuple(name for _, name in named))}

    def _named(self, raw: RawSample, cut: SubjectExample, rng: np.random.Generator) -> Iterator[tuple[Subject, Name]]:
        """The subjects that the caption names and that have a mask, each with who it is."""
        for number, tag, box, mask in zip(cut["entities"], cut["tags"], cut["boxes"], cut["masks"], strict=True):
            if not mask.any() or not mentions(cut["caption"], tag):
                continue
            name = (raw.source, raw.key, raw.every_entity().index(raw.annotation().entities[number]))
            elsewhere = self._pairs.draw(name, rng) or name
            shown = raw if elsewhere == name else self._pairs.read(elsewhere)
            pixels = shown.image()
            there = stored_mask(pixels, shown.every_entity()[elsewhere[2]])
            picture, silhouette = _close_up(pixels, there, self._cut.size_px)
            x1, y1, x2, y2 = box.tolist()
            yield Subject(picture, tag, mask=silhouette, box=(x1, y1, x2, y2)), self._pairs.individual(name)


def _close_up(pixels: Pixels, mask: Mask, most_px: int) -> tuple[Image.Image, Mask]:
    """What is around the subject alone, with a rim of a pixel, at most `most_px` on its longer side: an evaluation
    holds hundreds of references."""
    x1, y1, x2, y2 = extent(mask)
    picture, there = Image.fromarray(pixels[y1:y2, x1:x2]), Image.fromarray(mask[y1:y2, x1:x2])
    if max(picture.size) > most_px:
        width, height = (max(1, round(side * most_px / max(picture.size))) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
        there = there.convert("L").resize((width, height), Image.Resampling.BOX)
    cover = np.asarray(there.convert("L"))
    # A wire may cover no pixel by half.
    return ImageOps.expand(picture, 1), np.pad(cover >= min(128, int(cover.max())), 1)
