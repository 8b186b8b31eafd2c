"""Pairs that share entities become identities: one subject, in any number of images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datapipe.pairs.decide import Decision, Scores, image_numbers, number_of
from datapipe.pairs.files import Entities
from datapipe.pairs.scores import Candidates, seconds_apart
from datapipe.pairs.settings import DecideSettings
from datapipe.schema.pairs import PairRejection

LINKED = 0.5
"""Share of the pairs between two clusters that must have been found by themselves: one wrong pair joins little."""


@dataclass(frozen=True)
class Identities:
    """of: by the number of an entity, the smallest number of an entity of the same subject. rejected: (E,) uint8, as in
    `Decision`, of all candidates once identities are bounded."""

    of: Mapping[int, int]
    rejected: NDArray[np.uint8]


def find_identities(
    pairs: Candidates, scores: Scores, decision: Decision, entities: Entities, settings: DecideSettings
) -> Identities:
    """Joins pairs, the most alike first, as long as no subject comes to be twice in one image, and as at least `LINKED`
    of what comes together are pairs; then leaves out of each identity the copies of images, and what is over the
    bound."""
    image = image_numbers(entities)
    rejected = decision.rejected.copy()
    accepted = np.flatnonzero(rejected == 0)
    accepted = accepted[np.argsort(-pairs.similarity[accepted], kind="stable")]
    clusters = _Clusters(image, zip(pairs.a[accepted].tolist(), pairs.b[accepted].tolist(), strict=True))
    for pair in accepted:
        if not clusters.join(int(pairs.a[pair]), int(pairs.b[pair])):
            rejected[pair] = number_of(PairRejection.AMBIGUOUS)

    kept = accepted[rejected[accepted] == 0]
    weight: dict[int, float] = defaultdict(float)
    for pair in kept:
        for entity in (int(pairs.a[pair]), int(pairs.b[pair])):
            weight[entity] += float(pairs.similarity[pair])
    copies = _copies(pairs, scores, settings)
    left_out: dict[int, PairRejection] = {}
    found: dict[int, int] = {}
    for members in clusters.members():
        by_weight = sorted(members, key=lambda entity: (-weight[entity], entity))
        chosen = _chosen(by_weight, entities, copies, settings, left_out)
        found |= dict.fromkeys(chosen, min(chosen))
    for pair in kept:
        reasons = [left_out[e] for e in (int(pairs.a[pair]), int(pairs.b[pair])) if e in left_out]
        if reasons:
            rejected[pair] = min(map(number_of, reasons))
    return Identities(found, rejected)


class _Clusters:
    """Entities joined step by step, no two of one image in one cluster."""

    def __init__(self, image: NDArray[np.int64], pairs: Iterable[tuple[int, int]]) -> None:
        self._image = image
        self._partners: dict[int, set[int]] = defaultdict(set)
        for a, b in pairs:
            self._partners[a].add(b)
            self._partners[b].add(a)
        self._of: dict[int, int] = {}
        self._members: dict[int, list[int]] = {}
        self._images: dict[int, set[int]] = {}

    def join(self, a: int, b: int) -> bool:
        """Whether they are in one cluster now."""
        one, other = self._cluster(a), self._cluster(b)
        if one == other:
            return True
        if not self._images[one].isdisjoint(self._images[other]):
            return False
        if len(self._members[one]) < len(self._members[other]):
            one, other = other, one
        joined = set(self._members[one])
        linked = sum(len(self._partners[entity] & joined) for entity in self._members[other])
        if linked < LINKED * len(joined) * len(self._members[other]):
            return False
        moved = self._members.pop(other)
        self._of.update(dict.fromkeys(moved, one))
        self._members[one] += moved
        self._images[one] |= self._images.pop(other)
        return True

    def members(self) -> Iterable[list[int]]:
        return (members for members in self._members.values() if len(members) > 1)

    def _cluster(self, entity: int) -> int:
        if entity not in self._of:
            self._of[entity], self._members[entity] = entity, [entity]
            self._images[entity] = {int(self._image[entity])}
        return self._of[entity]


def _copies(pairs: Candidates, scores: Scores, settings: DecideSettings) -> set[tuple[int, int]]:
    """Candidates that are copies of each other by their cut-outs; those by their images are found by their hashes."""
    rows = np.flatnonzero(scores.aligned > settings.max_aligned)
    return set(zip(pairs.a[rows].tolist(), pairs.b[rows].tolist(), strict=True))


def _chosen(
    members: Iterable[int],
    entities: Entities,
    copies: set[tuple[int, int]],
    settings: DecideSettings,
    left_out: dict[int, PairRejection],
) -> list[int]:
    """The entities of an identity that stay, the best first; the others are noted in `left_out`."""
    chosen: list[int] = []
    for entity in members:
        others = np.array(chosen, np.int64)
        bits = np.bitwise_count(entities.phash[others] ^ entities.phash[entity])
        soon = seconds_apart(entities, others, np.full_like(others, entity)) < settings.min_seconds
        if (
            (bits < settings.min_copy_bits).any()
            or soon.any()
            or any(_pair(entity, other) in copies for other in chosen)
        ):
            left_out[entity] = PairRejection.REPEATED
        elif len(chosen) == settings.max_images:
            left_out[entity] = PairRejection.OVER_BOUND
        else:
            chosen.append(entity)
    return chosen


def _pair(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


def identity_name(entities: Entities, first: int) -> str:
    return f"{entities.row[first]:010d}-{entities.entity[first]}"
