"""Which members of a tar are one sample: the same rule for the pipeline and for the training stream."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from datapipe.image_file import IMAGE_SUFFIXES

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
    """The samples of a tar of these members, by their first members."""
    by_key: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        by_key.setdefault(split_key(name, rule)[0], []).append(number)
    groups = (groups_of_key(key, [(n, names[n]) for n in numbers], rule) for key, numbers in by_key.items())
    return sorted(itertools.chain.from_iterable(groups), key=lambda group: group.members[0])


def groups_of_key(key: str, members: Iterable[tuple[int, str]], rule: KeyRule) -> list[Group]:
    """The samples of all members of one key. `members`: number and name, in order.

    They are a sample wherever they lie, as long as no ending comes twice. Where one does, the key is that of several
    samples: each stretch of neighbors is one, and within a stretch, an ending that comes again begins the next.
    """
    stretches: list[list[list[int]]] = []
    """Stretches of neighbors; of each, its parts in which no ending comes twice."""
    endings: dict[int, str] = {}
    for number, name in members:
        if number - 1 not in endings:
            stretches.append([[]])
        endings[number] = split_key(name, rule)[1]
        if endings[number] in (endings[n] for n in stretches[-1][-1]):
            stretches[-1].append([])
        stretches[-1][-1].append(number)
    if len(set(endings.values())) == len(endings):
        return [Group(key, tuple(endings), together=len(stretches) == 1)]
    groups: list[Group] = []
    for stretch in stretches:
        clear = len({frozenset(endings[n] for n in part) for part in stretch}) == 1
        groups += [Group(key, tuple(part), clear=clear) for part in stretch]
    return groups


def rule_for(names: Iterable[str]) -> KeyRule:
    """What `auto` means for a tar of these members: first_dot, unless it would make one sample of several images that
    are none: `IMG_2020.01.05.jpg` and `IMG_2020.01.06.jpg`."""
    by_key: dict[str, list[str]] = {}
    for name in names:
        by_key.setdefault(split_key(name, "first_dot")[0], []).append(name)
    return "last_dot" if any(map(shares_its_key, by_key.values())) else "first_dot"


def shares_its_key(names: Iterable[str]) -> bool:
    """Whether the members of one key, by the rule first_dot, are images of several samples.

    They are if what follows the first dot of each is numbered, or if each has a text of its own. A member with the
    bare key, as in `7.left.jpg`, `7.right.jpg`, `7.json`, shows that they belong together.
    """
    images: set[str] = set()
    others: set[str] = set()
    for name in names:
        ending = split_key(name, "first_dot")[1]
        middle, dot, _ = ending.rpartition(".")
        if not dot:
            return False
        (images if is_image(ending) else others).add(middle)
    numbered = all(any(c.isdigit() for c in middle) for middle in images)
    return len(images) > 1 and (numbered or images <= others)


def main_image(endings: Sequence[str]) -> str | None:
    """The ending of a sample's image: a plain one (`jpg`) rather than a longer one (`seg.png`), and then the first."""
    images = [ending for ending in endings if is_image(ending)]
    return next((ending for ending in images if "." not in ending), images[0] if images else None)
