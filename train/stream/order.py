"""Which sample comes when: pure functions of (seed, epoch, position), so that a stream's state is a few integers.

A stream mixes sources. Position p of an epoch belongs to one of them (`Mixture`) and is its next sample; a source goes
through its own epochs, one after another, each in an order of its own (`EpochOrder`). `MixedOrder` is both together.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

BLOCK = 1024
"""Positions within which the sources of a mixture are shuffled; every block has them in the mixture's proportions."""

_SHARDS, _WINDOW, _MIXTURE, _DRAWS, _REPLACEMENT, _CROP, _REFERENCE = range(7)


def permutation(count: int, seed: int, *key: int) -> Integers:
    """A permutation of range(count). Sorts raw Philox output: NumPy promises to keep that, not its `permutation`."""
    return np.argsort(_philox(seed, key).random_raw(count), kind="stable")


def draws(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The source of every random draw made for one sample."""
    return np.random.Generator(_philox(seed, (_DRAWS, epoch, position)))


def crop_draws(key: str, crop: int) -> np.random.Generator:
    """The source of the draws of one of a sample's crops, the same in every run."""
    return np.random.Generator(_philox(0, (_CROP, _number(key), crop)))


def reference_draws(key: str, entity: int, draw: int) -> np.random.Generator:
    """The source of the draws of one of an entity's references, the same in every run. entity: its number in the
    sample."""
    return np.random.Generator(_philox(0, (_REFERENCE, _number(key), entity, draw)))


def _number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])


def replacement(count: int, seed: int, epoch: int, position: int, attempt: int) -> int:
    """The sample, of `count`, that is tried in the place of a corrupt one."""
    return int(_philox(seed, (_REPLACEMENT, epoch, position, attempt)).random_raw()) % count


def _philox(seed: int, key: Sequence[int]) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=tuple(key)))


class EpochOrder:
    """One source's samples in the order of one of its epochs.

    The shards are permuted, and samples shuffled inside windows of `window` successive shards: a reader has no more
    shards open than that, and reads every shard once. Unshuffled, samples come as they lie on disk.

    first: (S + 1,) int64, number of samples before each shard, and of all.
    """

    def __init__(self, first: Integers, window: int, seed: int, source: int, epoch: int, shuffled: bool) -> None:
        self._key = (seed, source, epoch)
        self._first, self._window, self._shuffled = first, window, shuffled
        counts = np.diff(first)
        shards = len(counts)
        self._shards = permutation(shards, seed, _SHARDS, source, epoch) if shuffled else np.arange(shards)
        before = np.concatenate([[0], np.cumsum(counts[self._shards])])
        self._starts = before[: shards + 1 : window]
        if self._starts[-1] != before[-1]:
            self._starts = np.append(self._starts, before[-1])
        self._held: tuple[int, Integers] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def windows(self) -> int:
        return len(self._starts) - 1

    def window_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def shards_of(self, window: int) -> list[int]:
        """The shards that a window draws from, in the order of the permutation; those without a sample are left out."""
        shards = self._shards[window * self._window : (window + 1) * self._window]
        return [int(s) for s in shards if self._first[s] < self._first[s + 1]]

    def samples(self, indices: Integers) -> Integers:
        """indices: (n,) places in this order -> (n,) samples, numbered as on disk."""
        found = np.empty_like(indices)
        windows = np.searchsorted(self._starts, indices, side="right") - 1
        for window in np.unique(windows):
            here = windows == window
            found[here] = self._samples_of(int(window))[indices[here] - self._starts[window]]
        return found

    def _samples_of(self, window: int) -> Integers:
        """Every sample of a window, in order."""
        if self._held[0] != window:
            shards = self.shards_of(window)
            samples = np.concatenate([np.arange(self._first[s], self._first[s + 1]) for s in shards])
            if self._shuffled:
                seed, source, epoch = self._key
                samples = samples[permutation(len(samples), seed, _WINDOW, source, epoch, window)]
            self._held = (window, samples)
        return self._held[1]


class Mixture:
    """Which source each position of an epoch belongs to, and how many positions that source had before it.

    counts: how often each source comes in an epoch. Shuffled, the sources are interleaved evenly: every block of
    positions has them in proportion, in an order drawn for (seed, epoch, block). Unshuffled, one source follows
    another.
    """

    def __init__(self, counts: Sequence[int] | Integers, seed: int, shuffled: bool) -> None:
        self._counts, self._seed, self._shuffled = np.array(counts, np.int64), seed, shuffled
        self._before = _block_shares(self._counts) if shuffled and len(counts) > 1 else None
        self._held: tuple[tuple[int, int], tuple[Integers, Integers]] | None = None

    def __len__(self) -> int:
        return int(self._counts.sum())

    def locate(self, epoch: int, positions: Integers) -> tuple[Integers, Integers]:
        """positions: (n,) in an epoch -> sources (n,), and ordinals (n,) among the source's own in this epoch."""
        if self._before is None:
            ends = np.cumsum(self._counts)
            sources = np.searchsorted(ends, positions, side="right")
            return sources, positions - (ends - self._counts)[sources]
        sources, ordinals = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(positions // BLOCK):
            here = positions // BLOCK == block
            inside = positions[here] - block * BLOCK
            block_sources, block_ordinals = self._block(epoch, int(block))
            sources[here], ordinals[here] = block_sources[inside], block_ordinals[inside]
        return sources, ordinals

    def _block(self, epoch: int, block: int) -> tuple[Integers, Integers]:
        """Sources and ordinals of a block's positions."""
        assert self._before is not None
        if self._held is None or self._held[0] != (epoch, block):
            before, after = self._before[block], self._before[block + 1]
            sources = np.repeat(np.arange(len(before)), after - before)
            sources = sources[permutation(len(sources), self._seed, _MIXTURE, epoch, block)]
            ordinals = np.empty_like(sources)
            for source, (start, end) in enumerate(zip(before, after, strict=True)):
                ordinals[sources == source] = np.arange(start, end)
            self._held = ((epoch, block), (sources, ordinals))
        return self._held[1]


@dataclass(frozen=True)
class Places:
    """What belongs to positions of an epoch. sources, samples: (n,), a sample by its number in its source's index.
    ahead: (source, shard) of those that they lie in, and of those that come next. alike: for each source, the samples
    of which one may stand in for a corrupt one. shape: height and width in pixels that all are to be cut to; None: the
    transform knows."""

    sources: Integers
    samples: Integers
    ahead: list[tuple[int, int]]
    alike: Sequence[Sequence[int] | Integers]
    shape: tuple[int, int] | None = None


class MixedOrder:
    """The samples of all sources, mixed, in epochs without end.

    firsts: of each source, as `EpochOrder` has it. counts: how often each source comes in an epoch.
    """

    def __init__(
        self, firsts: Sequence[Integers], counts: Sequence[int], window: int, seed: int, shuffled: bool
    ) -> None:
        self._firsts, self._counts = firsts, np.array(counts, np.int64)
        self._window, self._seed, self._shuffled = window, seed, shuffled
        self._mixture = Mixture(counts, seed, shuffled)
        self._orders: OrderedDict[tuple[int, int], EpochOrder] = OrderedDict()

    def __len__(self) -> int:
        return len(self._mixture)

    def length(self, epoch: int) -> int:
        """Positions of an epoch: as many in each."""
        return len(self)

    def locate(self, epoch: int, positions: Integers) -> Places:
        """positions: (n,) in an epoch."""
        return self.through_epochs(epoch * len(self) + positions)

    def through_epochs(self, positions: Integers) -> Places:
        """positions: (n,), counted from the first epoch's first."""
        sources, ordinals = np.empty_like(positions), np.empty_like(positions)
        epochs = positions // len(self)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            sources[here], ordinals[here] = self._mixture.locate(int(epoch), positions[here] % len(self))
        ordinals += epochs * self._counts[sources]
        samples = np.empty_like(positions)
        ahead: list[tuple[int, int]] = []
        for source in np.unique(sources).tolist():
            here = sources == source
            samples[here] = self._samples(source, ordinals[here])
            ahead += [(source, shard) for shard in self._shards_ahead(source, int(ordinals[here][-1]))]
        return Places(sources, samples, ahead, [range(int(first[-1])) for first in self._firsts])

    def _samples(self, source: int, ordinals: Integers) -> Integers:
        """ordinals: (n,) among the source's samples, through its own epochs."""
        epochs, places = np.divmod(ordinals, self._firsts[source][-1])
        samples = np.empty_like(ordinals)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._order(source, int(epoch)).samples(places[here])
        return samples

    def _shards_ahead(self, source: int, ordinal: int) -> list[int]:
        """The shards of the window that a sample is in, and of the next."""
        epoch, place = divmod(ordinal, int(self._firsts[source][-1]))
        order = self._order(source, epoch)
        window = order.window_of(place)
        last = window + 1 == order.windows
        return order.shards_of(window) + (
            self._order(source, epoch + 1).shards_of(0) if last else order.shards_of(window + 1)
        )

    def _order(self, source: int, epoch: int) -> EpochOrder:
        if (source, epoch) not in self._orders:
            order = EpochOrder(self._firsts[source], self._window, self._seed, source, epoch, self._shuffled)
            self._orders[source, epoch] = order
            if len(self._orders) > 3 * len(self._firsts):
                self._orders.popitem(last=False)
        return self._orders[source, epoch]


def _block_shares(counts: Integers) -> Integers:
    """(blocks + 1, D) int64: how many samples of each source come before each block. Rows rise by a block's length.

    Each block gives every source the whole samples that it is behind its share of the positions so far, and what is
    left of the block to those that are furthest behind.
    """
    total = int(counts.sum())
    ends = np.minimum(np.arange(1, -(-total // BLOCK) + 1) * BLOCK, total)
    before = np.zeros((len(ends) + 1, len(counts)), np.int64)
    for block, end in enumerate(ends):
        behind = counts * (end / total) - before[block]
        share = np.floor(np.maximum(behind, 0) + 1e-9).astype(np.int64)
        left = int(end - before[block].sum() - share.sum())
        furthest = np.argsort(share - behind, kind="stable")
        if left >= 0:
            share[furthest[:left]] += 1
        else:
            share[[s for s in furthest[::-1] if share[s]][:-left]] -= 1
        before[block + 1] = before[block] + share
    return before


def epoch_counts(sizes: Sequence[int], weights: Sequence[float] | None, epochs: Sequence[float]) -> list[int]:
    """How often each source comes in an epoch of the mixture.

    By weight: as many samples as the sources have together, shared by largest remainder. Else `epochs` times each.
    """
    if weights is None:
        return [round(size * times) for size, times in zip(sizes, epochs, strict=True)]
    return shared_out(sum(sizes), weights)


def shared_out(total: int, weights: Sequence[float] | Integers) -> list[int]:
    """`total` in proportion to the weights, by largest remainder."""
    exact = np.array(weights) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]
