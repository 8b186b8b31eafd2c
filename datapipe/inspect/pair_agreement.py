"""How well the identities that were found agree with those that a dataset came with."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from datapipe.inspect.audit import wilson_interval
from datapipe.schema import IDENTITIES
from datapipe.schema.pairs import GIVEN_IDENTITIES
from datapipe.shards import Store, read_identities

Named = dict[tuple[str, int], str]
"""Who an entity is, by the key of its sample and its number there."""


@dataclass(frozen=True)
class PairAgreement:
    """Pairs are all two entities of one identity in two images, as the trainer draws them. found: those between
    entities that the given identities name; right: of these, those of one given identity; there: those that the given
    identities hold."""

    found: int
    right: int
    there: int

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else float("nan")

    @property
    def recall(self) -> float:
        return self.right / self.there if self.there else float("nan")

    def __str__(self) -> str:
        if not self.found:
            return f"none of the {self.there:,} pairs of the given identities was found"
        low, high = wilson_interval(self.right, self.found)
        return (
            f"against the given identities: precision {self.precision:.3f} (95 %: {low:.3f} to {high:.3f}), "
            f"{self.right:,} of {self.found:,} pairs; recall {self.recall:.3f}, of {self.there:,}"
        )


def agreement(store: Store) -> PairAgreement | None:
    """None where the dataset came without identities."""
    if not store.exists(GIVEN_IDENTITIES):
        return None
    return compare(named(store, IDENTITIES), named(store, GIVEN_IDENTITIES))


def compare(found: Named, given: Named) -> PairAgreement:
    pairs = [(a, b) for a, b in _pairs(found) if a in given and b in given]
    right = sum(given[a] == given[b] for a, b in pairs)
    return PairAgreement(len(pairs), right, sum(1 for _ in _pairs(given)))


def named(store: Store, name: str) -> Named:
    """Raises RunError, ShardError, see `read_identities`."""
    return {(key, entity): identity for key, entity, identity in read_identities(store, name)}


def _pairs(named: Named) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """Every two entities of one identity in two images."""
    by_identity: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for entity, identity in named.items():
        by_identity[identity].append(entity)
    every: Iterable[list[tuple[str, int]]] = by_identity.values()
    return ((a, b) for entities in every for a, b in itertools.combinations(entities, 2) if a[0] != b[0])
