"""The orders to sort 64-bit hashes by, so that any two that differ in few bits agree in the highest bits of one.

Of hashes in blocks of bits, a key is some of the blocks. Hashes that differ in k bits differ in at most k blocks, and
keys are chosen so that for every k blocks there is one without any of them. Manku, Jain, Das Sarma (Detecting
near-duplicates for web crawling, WWW 2007) take all choices of m - k of m blocks; fewer do where keys may have fewer
blocks than that: a covering design, which is chosen greedily here.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
_STEPS_PER_TABLE = 19
"""With so many hashes more one is compared in the time that it takes in a table anyway, as measured with one and ten
million."""
_MOST_BLOCKS = 16
_MOST_CHOICES = 16_000_000
"""Keys times sets of blocks to avoid, among which are chosen: in 0.1 s and 50 MB."""

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Table:
    """An order to sort by. `swaps`: (places up, bits): pairs of bits that change places, so that those of the key stand
    on top. `earlier_keys`: the bits, so moved, in which hashes agree that an earlier table finds."""

    key_bits: int
    swaps: tuple[tuple[np.uint64, np.uint64], ...]
    earlier_keys: tuple[np.uint64, ...]


def tables_for(count: int, max_bits: int) -> list[Table]:
    """The tables that find all pairs of so many hashes. More hashes get longer keys, which fewer of them share, and
    more tables: as many as cost the least."""
    blocks, size = _shape(count, max_bits)
    edges = [round(i * HASH_BITS / blocks) for i in range(blocks + 1)]
    bits = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    keys = [sum(bits[block] for block in key) for key in _covering(blocks, size, max_bits)]
    return [_table(key, keys[:number]) for number, key in enumerate(keys)]


def _shape(count: int, max_bits: int) -> tuple[int, int]:
    """Number of blocks, and of those in a key."""

    def cost(blocks: int, size: int, tables: float) -> float:
        sharing = count / 2 ** (HASH_BITS * size / blocks)
        return tables * (_STEPS_PER_TABLE + sharing)

    at_least: list[tuple[float, int, int]] = []
    for blocks in range(max_bits + 1, _MOST_BLOCKS + 1):
        for size in range(1, blocks - max_bits + 1):
            if math.comb(blocks, max_bits) * math.comb(blocks, size) <= _MOST_CHOICES:
                at_least.append((cost(blocks, size, _at_least(blocks, size, max_bits)), blocks, size))
    best, shape = math.inf, (0, 0)
    for least, blocks, size in sorted(at_least):
        if least < best:
            needed = cost(blocks, size, len(_covering(blocks, size, max_bits)))
            best, shape = min((best, shape), (needed, (blocks, size)))
    return shape


def _at_least(blocks: int, size: int, avoid: int) -> int:
    """The fewest keys that there could be, by Schönheim's bound."""
    return math.ceil(blocks * _at_least(blocks - 1, size, avoid - 1) / (blocks - size)) if avoid else 1


@functools.cache
def _covering(blocks: int, size: int, avoid: int) -> list[tuple[int, ...]]:
    """Choices of `size` blocks, such that for any `avoid` blocks there is one without them: greedily, always the one
    that is without the most sets that no other is."""
    keys = list(itertools.combinations(range(blocks), size))
    without = (_masks(blocks, avoid)[:, None] & _masks(blocks, size)) == 0
    gain = without.sum(0, dtype=np.int32)
    is_open = np.ones(len(without), bool)
    chosen: list[tuple[int, ...]] = []
    while is_open.any():
        best = int(gain.argmax())
        chosen.append(keys[best])
        covered = is_open & without[:, best]
        is_open &= ~covered
        gain -= without[covered].sum(0, dtype=np.int32)
    return chosen


def _masks(blocks: int, size: int) -> NDArray[np.uint16]:
    chosen = np.array(list(itertools.combinations(range(blocks), size)), np.uint16)
    masks: NDArray[np.uint16] = np.bitwise_or.reduce(np.uint16(1) << chosen, axis=1, initial=0)
    return masks


def _table(key: int, earlier: list[int]) -> Table:
    key_bits = key.bit_count()
    top = HASH_BITS - key_bits
    ups = [bit for bit in range(top) if key >> bit & 1]
    downs = [bit for bit in range(top, HASH_BITS) if not key >> bit & 1]
    swaps: dict[int, int] = {}
    for up, down in zip(ups, downs, strict=True):
        swaps[down - up] = swaps.get(down - up, 0) | 1 << up
    pairs = tuple((np.uint64(shift), np.uint64(bits)) for shift, bits in swaps.items())
    earlier_keys = np.array(earlier, np.uint64)
    swap_bits(earlier_keys, pairs)
    return Table(key_bits, pairs, tuple(earlier_keys))


def swap_bits(hashes: Words, swaps: tuple[tuple[np.uint64, np.uint64], ...]) -> None:
    """Swaps them in place; a second time, they are back."""
    for shift, bits in swaps:
        changed = hashes >> shift
        changed ^= hashes
        changed &= bits
        hashes ^= changed
        changed <<= shift
        hashes ^= changed
