"""Duplicates in the whole input: exact ones by SHA-256, near ones by perceptual hashes that differ in few bits.

A row is a duplicate of the first earlier row that matches it and is no duplicate itself; which rows are earlier is the
caller's to say. So the rows that are kept do not depend on how the input is cut into slices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
_PAIRS_PER_SORT = 0.5
"""Pairs of hashes that are compared in the time in which one hash is sorted, as measured with one and ten million."""

Positions = NDArray[np.int64]


def exact_duplicates(sha256: NDArray[np.bytes_]) -> tuple[Positions, Positions]:
    """Among (N,) digests in order: positions of the duplicates, ascending, and of their originals; (M,) int64
    each."""
    _, first, group = np.unique(sha256, return_index=True, return_inverse=True)
    return _duplicates_from(first[group])


def near_duplicates(phash: NDArray[np.uint64], max_bits: int) -> tuple[Positions, Positions]:
    """Like `exact_duplicates`, for (N,) uint64 hashes that differ in at most `max_bits` bits."""
    hashes, first, group = np.unique(phash, return_index=True, return_inverse=True)
    by_row = np.argsort(first)
    rank = np.empty_like(by_row)
    rank[by_row] = np.arange(len(by_row))
    # Rows with the same hash share their fate, so only distinct hashes are compared, in order of first appearance.
    original = _first_originals(hashes[by_row], max_bits)
    return _duplicates_from(first[by_row][original][rank[group]])


def _duplicates_from(original: Positions) -> tuple[Positions, Positions]:
    duplicates = np.nonzero(original != np.arange(len(original)))[0]
    return duplicates, original[duplicates]


def _first_originals(hashes: NDArray[np.uint64], max_bits: int) -> Positions:
    """(N,) distinct hashes in order -> (N,) the first earlier one in reach that is no duplicate, or the hash itself."""
    paired = np.zeros(len(hashes), bool)
    for earlier, later in _pairs_within(hashes, max_bits):
        paired[earlier] = paired[later] = True
    near = np.nonzero(paired)[0]  # Usually few, which matters because the next step goes over the pairs several times.
    original = np.arange(len(hashes))
    original[near] = near[_greedy(hashes[near], max_bits)]
    return original


def _greedy(hashes: NDArray[np.uint64], max_bits: int) -> Positions:
    """Like `_first_originals`, in rounds: each settles the hashes that no unsettled earlier hash can make a duplicate.

    Every round streams the pairs again and holds none, because a cluster has quadratically many.
    """
    is_original = np.zeros(len(hashes), bool)
    unsettled = np.arange(len(hashes))
    while len(unsettled):
        blocked, reached = np.zeros((2, len(unsettled)), bool)
        for _, later in _pairs_within(hashes[unsettled], max_bits):
            blocked[later] = True
        for earlier, later in _pairs_within(hashes[unsettled], max_bits):
            reached[later[~blocked[earlier]]] = True
        is_original[unsettled[~blocked]] = True
        unsettled = unsettled[blocked & ~reached]
    original = np.arange(len(hashes))
    for earlier, later in _pairs_within(hashes, max_bits):
        counts = is_original[earlier] & ~is_original[later]
        np.minimum.at(original, later[counts], earlier[counts])
    return original


def _pairs_within(hashes: NDArray[np.uint64], max_bits: int) -> Iterator[tuple[Positions, Positions]]:
    """Pairs of positions i < j of distinct hashes at a Hamming distance of 1 to `max_bits`, at most N at a time; some
    come more than once.

    Hashes that differ in k bits agree in at least m - k of any m blocks of bits: sorting by each choice of m - k blocks
    brings every such pair together (Manku, Jain, Das Sarma: Detecting near-duplicates for web crawling, WWW 2007).
    """
    # Numbers are sorted many times as fast as positions by their numbers, so that the position is a part of the number.
    position_bits = np.uint64(max(len(hashes) - 1, 1).bit_length())
    one_key = np.uint64(1) << position_bits
    positions = np.arange(len(hashes), dtype=np.uint64)
    keyed, scratch = np.empty((2, len(hashes)), np.uint64)  # as fresh memory costs more than what is done in it
    for blocks in _tables(len(hashes), max_bits) if max_bits else ():
        _put_keys(hashes, blocks, keyed, scratch)
        keyed <<= position_bits  # The first bits of a long key go, which costs comparisons only.
        keyed |= positions
        keyed.sort()
        differ = np.bitwise_xor(keyed[1:], keyed[:-1], out=scratch[1:])
        start = np.flatnonzero(differ < one_key)
        for step in itertools.count(1):
            if not len(start):
                break
            a, b = ((keyed[at] & (one_key - np.uint64(1))).astype(np.int64) for at in (start, start + step))
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= max_bits
            yield np.minimum(a, b)[near], np.maximum(a, b)[near]
            # Keys are sorted, so only hashes that have the same key as one step nearer can have it one further.
            start = start[: np.searchsorted(start, len(keyed) - step - 1)]
            start = start[(keyed[start] ^ keyed[start + step + 1]) < one_key]


def _put_keys(
    hashes: NDArray[np.uint64], blocks: Sequence[range], keys: NDArray[np.uint64], scratch: NDArray[np.uint64]
) -> None:
    """Sets `keys` (N,) to the bits of each hash that lie in the blocks, side by side."""
    keys.fill(0)
    for block in blocks:
        np.right_shift(hashes, np.uint64(block.start), out=scratch)
        scratch &= np.uint64((1 << len(block)) - 1)
        keys <<= np.uint64(len(block))
        keys |= scratch


def _tables(count: int, max_bits: int) -> list[tuple[range, ...]]:
    """The blocks of bits that each table sorts by. More blocks in all make longer keys, which fewer hashes share, and
    more tables: their number is that which costs the least."""

    def cost(blocks: int) -> float:
        sharing = count / 2 ** (HASH_BITS * (blocks - max_bits) / blocks)
        return math.comb(blocks, max_bits) * (_PAIRS_PER_SORT + sharing / 2)

    blocks = min(range(max_bits + 1, HASH_BITS + 1), key=cost)
    edges = [round(i * HASH_BITS / blocks) for i in range(blocks + 1)]
    return list(itertools.combinations(itertools.starmap(range, itertools.pairwise(edges)), blocks - max_bits))
