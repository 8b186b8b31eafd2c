"""Where the actors of `run.pools` fit: on which nodes, and how many of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from datapipe.recipe import Pool, RunSettings
from subject_diffusion.errors import RunError

_ROUNDING = 1e-6
"""Three actors of 0.333 GPU each are to share one, and sums of fractions are not exact."""


@dataclass
class Node:
    """What a node has left. `gpus`: of each of its GPUs, because an actor's fraction must lie within one."""

    cpus: float
    gpus: list[float] = field(default_factory=list)

    @staticmethod
    def of(cpus: float, gpus: float) -> Node:
        """A node with nothing on it."""
        return Node(cpus, [1.0] * int(gpus))

    def take(self, pool: Pool) -> bool:
        """Puts an actor of the pool here, if it fits."""
        whole = int(pool.gpus) if pool.gpus >= 1 else 0
        share = pool.gpus if pool.gpus < 1 else 1.0
        free = [i for i, left in enumerate(self.gpus) if left >= share - _ROUNDING]
        wanted = whole or (1 if pool.gpus else 0)
        if self.cpus < pool.cpus - _ROUNDING or len(free) < wanted:
            return False
        self.cpus -= pool.cpus
        # The fullest GPU first, so that whole ones stay free.
        for i in sorted(free, key=lambda i: self.gpus[i])[:wanted]:
            self.gpus[i] -= share
        return True


def fits(pools: Sequence[Pool], nodes: Sequence[tuple[float, float]]) -> bool:
    """Whether one actor of each pool given, which may be given several times, fits at the same time. `nodes`: (CPUs,
    GPUs) of each."""
    return _place(pools, [Node.of(*node) for node in nodes])


def workers_of(settings: RunSettings, nodes: Sequence[tuple[float, float]], slices: int) -> list[int]:
    """The number of actors of each pool: as the recipe says, or else as many as fit, the same for all; at least one,
    and no more than there are slices."""
    fixed = [pool for pool in settings.pools for _ in range(min(pool.workers or 0, slices))]
    free = [pool for pool in settings.pools if pool.workers is None]
    left = [Node.of(*node) for node in nodes]
    _place(fixed, left)
    rounds = next(i for i in itertools.count() if i == slices or not free or not _place(free, left))
    return [min(pool.workers or max(1, rounds), slices) for pool in settings.pools]


def fetchers_beside(settings: RunSettings, nodes: Sequence[tuple[float, float]], workers: Sequence[int]) -> int:
    """How many actors that download fit beside so many of each pool; 0 where these do not all fit."""
    left = [Node.of(*node) for node in nodes]
    fit = _place([pool for pool, size in zip(settings.pools, workers, strict=True) for _ in range(size)], left)
    return fetchers(settings, [node.cpus for node in left]) if fit else 0


def fetchers(settings: RunSettings, cpus: Sequence[float]) -> int:
    """How many actors that download fit on nodes of so many CPUs."""
    return sum(int(free / settings.fetch_cpus + _ROUNDING) for free in cpus)


def balanced(
    pools: Sequence[Pool], actor_s: Sequence[float], nodes: Sequence[tuple[float, float]], most: int
) -> list[int]:
    """The number of actors of each pool, of which each needs `actor_s` seconds for its part of the work: as the recipe
    says, or else so that the slowest pool is done as early as possible; at least one, at most `most`. Raises RunError
    when one of each, or what the recipe says, does not fit."""
    left = [Node.of(*node) for node in nodes]
    sizes = [min(pool.workers or 1, most) for pool in pools]
    first = [pool for pool, size in zip(pools, sizes, strict=True) for _ in range(size)]
    if not _place(first, left):
        there = " and ".join(sorted({f"{cpus:g} CPU and {gpus:g} GPU" for cpus, gpus in nodes}))
        raise RunError(f"{described(first)}: not all fit {len(nodes)} machines of {there} each at the same time")
    free = {i for i, pool in enumerate(pools) if pool.workers is None and sizes[i] < most}
    rooms = [list(left) for _ in pools]
    while free:
        slowest = max(free, key=lambda i: actor_s[i] / sizes[i])
        room = rooms[slowest]
        while room and not room[0].take(pools[slowest]):
            del room[0]  # Nodes only get fuller.
        sizes[slowest] += bool(room)
        if not room or sizes[slowest] == most:
            free.discard(slowest)
    return sizes


def asked(settings: RunSettings, slices: int) -> list[Pool]:
    """The actors that must be there at the same time: of every pool one, or as many as the recipe says."""
    return [pool for pool in settings.pools for _ in range(min(pool.workers or 1, max(1, slices)))]


def described(pools: Sequence[Pool]) -> str:
    """The actors in words: "caption+tag: 1 CPU, 0.5 GPU"."""
    distinct = {id(pool): pool for pool in pools}.values()
    parts = []
    for pool in distinct:
        count = sum(pool is other for other in pools)
        size = f"{pool.cpus:g} CPU" + (f", {pool.gpus:g} GPU" if pool.gpus else "")
        name = f"{pool.name}: " if pool.name else ""
        parts.append(f"{name}{f'{count} times ' if count > 1 else ''}{size}")
    return "; ".join(parts)


def _place(pools: Sequence[Pool], nodes: list[Node]) -> bool:
    """Puts an actor of each pool on the first node where it fits; the largest first."""
    largest_first = sorted(pools, key=lambda pool: (-pool.gpus, -pool.cpus))
    return all(any(node.take(pool) for node in nodes) for pool in largest_first)
