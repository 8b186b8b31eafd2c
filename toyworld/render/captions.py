"""The grammar: what is said of a scene, with the place of every phrase in what is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toyworld.render.drawings import NOUNS
from toyworld.render.identity import COLORS, Identity
from toyworld.render.textures import BACKGROUNDS

_IRREGULAR = {"fish": "fish", "butterfly": "butterflies", "cactus": "cactuses"}
PLURALS: dict[str, str] = {noun: _IRREGULAR.get(noun, f"{noun}s") for noun in NOUNS}
_COUNTS = {2: "two", 3: "three", 4: "four"}
_BACKWARDS = 0.15
"""Share of pairs that are told from right to left. Any other order could not be learned from the picture."""

_RELATIONS = ("to the left of", "to the right of", "above", "below", "next to", "and", "with", "near")
_TEMPLATES = ("{} on {}", "{} on {}", "a photo of {} on {}", "{} in front of {}", "there is {} on {}")
_PLACELESS = ("{}", "a photo of {}", "a picture of {}")

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            *NOUNS,
            *PLURALS.values(),
            *COLORS,
            *BACKGROUNDS,
            *_COUNTS.values(),
            "striped",
            "dotted",
            "checkered",
            "a",
            "an",
            ",",
            *" ".join((*_RELATIONS, *_TEMPLATES, *_PLACELESS)).replace("{}", "").split(),
        }
    )
)
"""Every word that a caption can use."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Mention:
    """One phrase of a caption and the subjects it means. Spans are [start, end) characters."""

    subjects: tuple[int, ...]
    phrase_span: Span
    noun_span: Span


def describe(
    identities: Sequence[Identity],
    boxes: Sequence[tuple[float, float, float, float]],
    background: str,
    rng: np.random.Generator,
) -> tuple[str, list[Mention]]:
    """A caption that names exactly the nouns there are, mostly from left to right, and its mentions.

    Subjects of one noun share a mention.
    """
    groups: dict[str, list[int]] = {}
    from_left = sorted(range(len(identities)), key=lambda i: boxes[i][0] + boxes[i][2])
    backwards = len(from_left) == 2 and rng.random() < _BACKWARDS
    for i in reversed(from_left) if backwards else from_left:
        groups.setdefault(identities[i].noun, []).append(i)
    phrases = [_phrase([identities[i] for i in members], rng) for members in groups.values()]
    joints = _joints(list(groups.values()), boxes, rng)
    if rng.random() < 0.75:
        head, middle, tail = *_TEMPLATES[rng.integers(len(_TEMPLATES))].partition("{}")[::2], background
        middle = middle.replace("{}", tail)
    else:
        head, _, middle = _PLACELESS[rng.integers(len(_PLACELESS))].partition("{}")
    caption, mentions = head, []
    for members, (phrase, noun), joint in zip(groups.values(), phrases, joints, strict=True):
        caption += joint
        start = len(caption)
        caption += phrase
        mentions.append(Mention(tuple(members), (start, len(caption)), (len(caption) - len(noun), len(caption))))
    return caption + middle, mentions


def _phrase(members: Sequence[Identity], rng: np.random.Generator) -> tuple[str, str]:
    """The phrase and the noun that ends it."""
    colors = {m.color for m in members}
    patterns = {m.look.pattern for m in members}
    adjectives = []
    if len(colors) == 1 and rng.random() < 0.75:
        adjectives.append(next(iter(colors)))
    if len(patterns) == 1 and "plain" not in patterns and rng.random() < 0.5:
        adjectives.append(next(iter(patterns)))
    noun = members[0].noun if len(members) == 1 else PLURALS[members[0].noun]
    words = " ".join([*adjectives, noun])
    article = _COUNTS[len(members)] if len(members) > 1 else ("an" if words[0] in "aeiou" else "a")
    return f"{article} {words}", noun


def _joints(
    groups: Sequence[list[int]], boxes: Sequence[tuple[float, float, float, float]], rng: np.random.Generator
) -> list[str]:
    """What stands before each phrase."""
    if len(groups) == 2 and all(len(g) == 1 for g in groups) and rng.random() < 0.6:
        return ["", f" {_true_relation(boxes[groups[0][0]], boxes[groups[1][0]])} "]
    if len(groups) == 2:
        return ["", f" {('and', 'with', 'next to', 'near')[rng.integers(4)]} "]
    return [""] + [" , "] * (len(groups) - 2) + [" and "] * (len(groups) > 1)


def _true_relation(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> str:
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    if abs(dx) >= abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"
