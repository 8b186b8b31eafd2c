"""Which members of a tar are one sample: the same rule for the pipeline and for the training stream."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from datapipe.decoding import IMAGE_SUFFIXES

KeyRule = Literal["auto", "first_dot", "last_dot"]

IMAGE_ENDINGS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
"""What is taken for an image. Not all can be decoded everywhere: those that cannot are rows with a verdict."""


def is_clutter(name: str) -> bool:
    """Whether a member is none of the data: what macOS and file managers leave, such as `._photo.jpg`."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def split_key(name: str, rule: KeyRule) -> tuple[str, str]:
    """Key and ending of a member's path, the ending in lower case and without its dot. `./` in front is no part of it.

    `auto` splits as `first_dot` does.
    """
    folder, base = posixpath.split(name.removeprefix("./"))
    stem, _, ending = base.rpartition(".") if rule == "last_dot" and "." in base else base.partition(".")
    return posixpath.join(folder, stem), ending.lower()


def is_image(ending: str) -> bool:
    """Whether an ending, of one part or several (`image.jpg`), is that of an image."""
    return ending.rpartition(".")[2] in IMAGE_ENDINGS


@dataclass(frozen=True)
class Group:
    """One sample of a tar. `members`: their numbers; `together`: nothing else lies between them; `clear`: False if the
    key comes several times in such an order that nobody can tell which text is whose."""

    key: str
    members: tuple[int, ...]
    together: bool = True
    clear: bool = True


def group_members(names: Sequence[str], rule: KeyRule) -> list[Group]:
    """The samples of a tar of these members, by their first members.

    Members of one key are a sample wherever they lie, as long as no ending comes twice. Where one does, the key is that
    of several samples: each stretch of neighbors is one, and within a stretch, an ending that comes again begins the
    next.
    """
    runs: dict[str, list[list[list[int]]]] = {}
    """Of each key, its stretches of neighbors; of each stretch, its parts in which no ending comes twice."""
    endings: list[str] = []
    last = None
    for number, name in enumerate(names):
        key, ending = split_key(name, rule)
        endings.append(ending)
        stretches = runs.setdefault(key, [])
        if key != last:
            stretches.append([[]])
        if ending in (endings[n] for n in stretches[-1][-1]):
            stretches[-1].append([])
        stretches[-1][-1].append(number)
        last = key
    groups: list[Group] = []
    for key, stretches in runs.items():
        everything = [n for stretch in stretches for part in stretch for n in part]
        if len({endings[n] for n in everything}) == len(everything):
            groups.append(Group(key, tuple(everything), together=len(stretches) == 1))
            continue
        for stretch in stretches:
            clear = len({frozenset(endings[n] for n in part) for part in stretch}) == 1
            groups += [Group(key, tuple(part), clear=clear) for part in stretch]
    return sorted(groups, key=lambda group: group.members[0])


def rule_for(names: Iterable[str]) -> KeyRule:
    """What `auto` means for a tar of these members: first_dot, unless it would make one sample of several images that
    are none: `IMG_2020.01.05.jpg` and `IMG_2020.01.06.jpg`.

    They are none if what follows the first dot of each is numbered, or if each has a text of its own. A member with the
    bare key, as in `7.left.jpg`, `7.right.jpg`, `7.json`, shows that they belong together.
    """
    parts: dict[str, tuple[set[str], set[str]]] = {}
    bare: set[str] = set()
    for name in names:
        key, ending = split_key(name, "first_dot")
        middle, dot, _ = ending.rpartition(".")
        if not dot:
            bare.add(key)
        else:
            images, others = parts.setdefault(key, (set(), set()))
            (images if is_image(ending) else others).add(middle)
    for key, (images, others) in parts.items():
        numbered = all(any(c.isdigit() for c in middle) for middle in images)
        if len(images) > 1 and key not in bare and (numbered or images <= others):
            return "last_dot"
    return "first_dot"


def main_image(endings: Sequence[str]) -> str | None:
    """The ending of a sample's image: a plain one (`jpg`) rather than a longer one (`seg.png`), and then the first."""
    images = [ending for ending in endings if is_image(ending)]
    return next((ending for ending in images if "." not in ending), images[0] if images else None)
