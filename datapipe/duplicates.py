"""Duplicates over the whole input: exact ones by SHA-256, near ones by perceptual hashes that differ in few bits.

A row is a duplicate of the first earlier row that is none itself and is the same; so what is kept does not depend on
how
the input was cut into slices.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
_ROWS_A_RUN = 8
"""Hashes that may share a key on average; more make comparing dearer than another table."""
_MAX_TABLES = 120

Positions = NDArray[np.int64]


def exact_duplicates(sha256: NDArray[np.bytes_]) -> tuple[Positions, Positions]:
    """Among (N,) digests in input order: positions of the duplicates, ascending, and of their originals; (M,) int64
    each."""
    _, first, group = np.unique(sha256, return_index=True, return_inverse=True)
    return _duplicates_from(first[group])


def near_duplicates(phash: NDArray[np.uint64], max_bits: int) -> tuple[Positions, Positions]:
    """As `exact_duplicates`, for (N,) uint64 hashes that differ in at most `max_bits` bits."""
    hashes, first, group = np.unique(phash, return_index=True, return_inverse=True)
    by_row = np.argsort(first)
    rank = np.empty_like(by_row)
    rank[by_row] = np.arange(len(by_row))
    # Rows of one hash share their fate, so that the greedy pass runs over distinct hashes, in order of first
    # appearance.
    original = np.arange(len(hashes))
    for earlier, later in _pairs_within(hashes[by_row], max_bits):
        if original[later] == later and original[earlier] == earlier:
            original[later] = earlier
    return _duplicates_from(first[by_row][original][rank[group]])


def _duplicates_from(original: Positions) -> tuple[Positions, Positions]:
    duplicates = np.nonzero(original != np.arange(len(original)))[0]
    return duplicates, original[duplicates]


def _pairs_within(hashes: NDArray[np.uint64], max_bits: int) -> Positions:
    """(P, 2) pairs i < j of distinct hashes at a Hamming distance of 1 to `max_bits`, sorted by (j, i).

    Hashes that differ in k bits agree in at least m - k of any m blocks of bits: sorting by each choice of m - k blocks
    brings every such pair together (Manku, Jain, Das Sarma: Detecting near-duplicates for web crawling, WWW 2007).
    """
    found = [np.empty(0, np.int64)]
    for mask in _key_masks(len(hashes), max_bits) if max_bits else ():
        keys = hashes & np.uint64(mask)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for step in itertools.count(1):
            together = np.nonzero(keys[step:] == keys[:-step])[0]
            if not len(together):
                break
            a, b = order[together], order[together + step]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= max_bits
            low, high = np.minimum(a, b)[near], np.maximum(a, b)[near]
            found.append(high * len(hashes) + low)
    codes = np.unique(np.concatenate(found))
    return np.stack([codes % max(len(hashes), 1), codes // max(len(hashes), 1)], axis=1)


def _key_masks(count: int, max_bits: int) -> list[int]:
    """The bits that each table sorts by: as few tables as keep runs of equal keys short."""
    blocks = max_bits + 1
    while (
        count > _ROWS_A_RUN * 2 ** (HASH_BITS * (blocks - max_bits) / blocks)
        and math.comb(blocks + 1, max_bits) <= _MAX_TABLES
    ):
        blocks += 1
    edges = [round(i * HASH_BITS / blocks) for i in range(blocks + 1)]
    block_masks = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [sum(chosen) for chosen in itertools.combinations(block_masks, blocks - max_bits)]
