"""Individuals that words cannot tell apart: of one noun and of the same two colors, but of other shades, patterns and
shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from toyworld.render.canvas import RGB
from toyworld.render.identity import COLORS, Split, sample_identity
from toyworld.render.scene import Scene, render_scene

LOOKED_THROUGH = 1000
"""Individuals of each noun among which look-alikes are sought."""
_HOW_MANY = ((1, 2, 3, 4), (0.15, 0.4, 0.3, 0.15))
"""Subjects of a scene, and how often there are so many."""

Group = tuple[int, ...]
"""Numbers of individuals of one noun."""


def look_alikes(noun: str, split: Split, individuals: int) -> Iterator[Group]:
    """Groups of so many individuals whose main and second colors go by the same words."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index in range(LOOKED_THROUGH):
        identity = sample_identity(noun, index, split)
        group = groups[identity.color, _word(identity.look.second)]
        group.append(index)
        if len(group) == individuals:
            yield tuple(group)
            group.clear()


def look_alike_scene(seed: int, groups: Mapping[str, Sequence[Group]], size: int, split: Split = "heldout") -> Scene:
    """A scene of one to four nouns, each an individual of one of its groups. size: pixels, of either side."""
    rng = np.random.default_rng(np.random.SeedSequence([0xA11, seed]))
    nouns = rng.choice(sorted(groups), min(int(rng.choice(_HOW_MANY[0], p=_HOW_MANY[1])), len(groups)), replace=False)
    chosen = [groups[str(noun)][int(rng.integers(len(groups[str(noun)])))] for noun in nouns]
    identities = [
        sample_identity(str(noun), group[int(rng.integers(len(group)))], split)
        for noun, group in zip(nouns, chosen, strict=True)
    ]
    return render_scene(seed, size=size, split=split, identities=identities)


def _word(color: RGB) -> str:
    """The name of the nearest color that has one."""
    return min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLORS[name], color, strict=True)))
