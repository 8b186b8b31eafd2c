"""The numbers of things that were detected, in words, in the caption, as the released code puts them there."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from datapipe.schema import Sample, Tag

NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def with_number_words(sample: Sample) -> Sample:
    """Before the first mention of every noun with two to six candidates that are not rejected stands their number. The
    spans of tags and candidates move along; `without_number_words` undoes it."""
    counts = Counter(c.tag for c in sample.candidates if c.rejected is None)
    numbered: dict[str, Tag] = {}
    for tag in sorted(sample.tags, key=lambda t: t.span):
        if counts[tag.text] in NUMBER_WORDS:
            numbered.setdefault(tag.text, dataclasses.replace(tag, number=counts[tag.text]))
    starts = {tag.span: tag for tag in numbered.values()}
    sample = sample.replace(tags=tuple(starts.get(t.span, t) for t in sample.tags))
    return _edited(sample, [(tag.span[0], 0, _word(tag)) for tag in starts.values()])


def without_number_words(sample: Sample) -> Sample:
    """The sample as the stages before selection left it."""
    edits = [(t.span[0] - len(_word(t)), len(_word(t)), "") for t in sample.tags if t.number is not None]
    done = _edited(sample, edits)
    return done.replace(tags=tuple(dataclasses.replace(t, number=None) for t in done.tags))


def _word(tag: Tag) -> str:
    return f"{NUMBER_WORDS[tag.number]} " if tag.number is not None else ""


Edit = tuple[int, int, str]
"""(place, characters that go, text that comes there)."""


def _edited(sample: Sample, edits: Sequence[Edit]) -> Sample:
    caption = sample.caption
    for place, gone, text in sorted(edits, reverse=True):
        caption = caption[:place] + text + caption[place + gone :]

    def moved(span: tuple[int, int]) -> tuple[int, int]:
        by = sum(len(text) - gone for place, gone, text in edits if place <= span[0])
        return span[0] + by, span[1] + by

    return sample.replace(
        caption=caption,
        tags=tuple(dataclasses.replace(t, span=moved(t.span)) for t in sample.tags),
        candidates=tuple(dataclasses.replace(c, span=moved(c.span)) for c in sample.candidates),
    )
