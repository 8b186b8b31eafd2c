"""Duplicates in the whole input: exact ones by SHA-256, near ones by perceptual hashes that differ in few bits.

A row is a duplicate of the first earlier row that matches it and is no duplicate itself; which rows are earlier is the
caller's to say. So the rows that are kept do not depend on how the input is cut into slices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
_STEPS_PER_SORT = 33
"""Neighbors that a hash is compared with in the time in which it is sorted, as measured with one million."""
_PAIRS_HELD = 4
"""Pairs that are held for each hash that has any."""
_AT_ONCE = 1 << 15
"""Hashes whose neighbors are compared together: they and what comes of them fit a core's own cache."""

Positions = NDArray[np.int64]

FindPaired = Callable[[NDArray[np.uint64], int], NDArray[np.bool_]]


def exact_duplicates(sha256: NDArray[np.bytes_]) -> tuple[Positions, Positions]:
    """Among (N,) digests in order: positions of the duplicates, ascending, and of their originals; (M,) int64
    each."""
    _, first, group = np.unique(sha256, return_index=True, return_inverse=True)
    return _duplicates_from(first[group])


def near_duplicates(
    phash: NDArray[np.uint64], max_bits: int, find_paired: FindPaired | None = None
) -> tuple[Positions, Positions]:
    """Like `exact_duplicates`, for (N,) uint64 hashes that differ in at most `max_bits` bits. `find_paired`: `paired`,
    perhaps on several machines, because it takes most of the time; by default here."""
    in_order = np.sort(phash)
    is_new = np.ones(len(phash), bool)
    is_new[1:] = in_order[1:] != in_order[:-1]
    hashes = in_order[is_new]
    found = (find_paired or paired)(hashes, max_bits)
    # Usually few, which matters because everything after this has to keep the order, and sorts and looks up by it.
    rows = _rows_of(np.sort(np.concatenate([hashes[found], in_order[~is_new]])), phash)
    duplicates, originals = _duplicates_from(_originals(phash[rows], max_bits))
    return rows[duplicates], rows[originals]


def _duplicates_from(original: Positions) -> tuple[Positions, Positions]:
    duplicates = np.nonzero(original != np.arange(len(original)))[0]
    return duplicates, original[duplicates]


def _rows_of(wanted: NDArray[np.uint64], phash: NDArray[np.uint64]) -> Positions:
    """Where among (N,) hashes those are that (M,) ascending ones name."""
    # Most are told apart by their first bits, in a table that fits a core's cache where few are wanted.
    bits = min(len(wanted).bit_length() + 3, 30)
    may_be = np.zeros(1 << bits, bool)
    may_be[wanted >> np.uint64(HASH_BITS - bits)] = True
    rows = np.flatnonzero(may_be[phash >> np.uint64(HASH_BITS - bits)])
    if not len(rows):
        return rows
    at = np.minimum(np.searchsorted(wanted, phash[rows]), len(wanted) - 1)
    found: Positions = rows[wanted[at] == phash[rows]]
    return found


BYTES_PER_HASH = 10
"""Memory of `paired`: a table's order of the hashes, and what it found."""


def paired(hashes: NDArray[np.uint64], max_bits: int, tables: Sequence[Table] | None = None) -> NDArray[np.bool_]:
    """Which of (N,) distinct hashes, ascending, have another in reach, as far as these tables find it; by default all
    that it takes. Takes `BYTES_PER_HASH` of memory for each."""
    found = np.zeros(len(hashes), bool)
    held: list[NDArray[np.uint64]] = []
    count = 0
    for first, second in _pairs(hashes, max_bits, tables):
        held += first, second
        count += len(first)
        if count > min(_AT_ONCE, len(hashes)):
            _mark(found, hashes, held)
            held, count = [], 0
    _mark(found, hashes, held)
    return found


def _mark(found: NDArray[np.bool_], hashes: NDArray[np.uint64], some: Sequence[NDArray[np.uint64]]) -> None:
    """Marks the positions of some of the ascending hashes, which are looked up in their order, as memory likes it."""
    found[np.searchsorted(hashes, np.sort(np.concatenate([hashes[:0], *some])))] = True


def _originals(phash: NDArray[np.uint64], max_bits: int) -> Positions:
    """(N,) hashes in order -> (N,) the first earlier one in reach that is no duplicate, or the hash itself."""
    hashes, first, group = np.unique(phash, return_index=True, return_inverse=True)
    by_row = np.argsort(first)
    rank = np.empty_like(by_row)
    rank[by_row] = np.arange(len(by_row))
    # Rows with the same hash share their fate, so only distinct hashes are compared, in order of first appearance.
    original: Positions = first[by_row][_greedy(hashes[by_row], max_bits)][rank[group]]
    return original


def _greedy(hashes: NDArray[np.uint64], max_bits: int) -> Positions:
    """Like `_originals`, of distinct hashes, in rounds: each settles those that no open earlier one can make a
    duplicate."""
    pairs = _pairs_again(hashes, max_bits)
    is_original, is_open = np.zeros(len(hashes), bool), np.ones(len(hashes), bool)
    while is_open.any():
        blocked, reached = np.zeros((2, len(hashes)), bool)
        for earlier, later in pairs():
            blocked[later[is_open[earlier] & is_open[later]]] = True
        for earlier, later in pairs():
            reached[later[is_open[earlier] & is_open[later] & ~blocked[earlier]]] = True
        is_original |= is_open & ~blocked
        is_open &= blocked & ~reached
    original = np.arange(len(hashes))
    for earlier, later in pairs():
        counts = is_original[earlier] & ~is_original[later]
        np.minimum.at(original, later[counts], earlier[counts])
    return original


def _pairs_again(hashes: NDArray[np.uint64], max_bits: int) -> Callable[[], Iterator[tuple[Positions, Positions]]]:
    """What gives the pairs, as often as it is called. They are held where they are not many more than the hashes; of a
    cluster, which has quadratically many, they are found again each time."""
    held: list[tuple[Positions, Positions]] = []
    count = 0
    for pair in _pairs_within(hashes, max_bits):
        held.append(pair)
        count += len(pair[0])
        if count > _PAIRS_HELD * len(hashes):
            return lambda: _pairs_within(hashes, max_bits)
    return lambda: iter(held)


def _pairs_within(hashes: NDArray[np.uint64], max_bits: int) -> Iterator[tuple[Positions, Positions]]:
    """Pairs of positions i < j of distinct hashes at a Hamming distance of 1 to `max_bits`, each once."""
    by_hash = np.argsort(hashes)
    in_order = hashes[by_hash]
    for pair in _pairs(hashes, max_bits):
        a, b = (by_hash[np.searchsorted(in_order, one)] for one in pair)
        yield np.minimum(a, b), np.maximum(a, b)


def _pairs(
    hashes: NDArray[np.uint64], max_bits: int, tables: Sequence[Table] | None = None
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    """Pairs of distinct hashes at a Hamming distance of 1 to `max_bits`, each once; as far as `tables` find them, by
    default all.

    Hashes that differ in k bits agree in at least m - k of any m blocks of bits: sorting by each choice of m - k blocks
    brings every such pair together (Manku, Jain, Das Sarma: Detecting near-duplicates for web crawling, WWW 2007).
    """
    if not max_bits or len(hashes) < 2:
        return
    for table in tables_for(len(hashes), max_bits) if tables is None else tables:
        yield from _pairs_of_table(hashes, table, max_bits)


def _pairs_of_table(
    hashes: NDArray[np.uint64], table: Table, max_bits: int
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    """Pairs of hashes that agree in the table's key and differ in at most `max_bits` bits; so few at a time that
    they fit a core's cache, too.

    The other bits of a hash stand behind its key and are sorted with it: two bits changing places change no distance,
    so that neighbors are compared where they lie, one cacheful after another.
    """
    keyed = np.empty_like(hashes)
    for start in range(0, len(hashes), _AT_ONCE):
        keyed[start : start + _AT_ONCE] = _moved(hashes[start : start + _AT_ONCE], table.moves)
    keyed.sort()
    back = [(to, at, size) for at, to, size in table.moves]
    for start in range(0, len(keyed), _AT_ONCE):
        for first, second in _near_neighbors(keyed[start:], table, max_bits):
            yield _moved(first, back), _moved(second, back)


def _near_neighbors(
    keyed: NDArray[np.uint64], table: Table, max_bits: int
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    """Pairs of sorted hashes, of which the first is among the first `_AT_ONCE`, and for which no table before this one
    has the same key."""
    other_bits = HASH_BITS - table.key_bits
    found: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = []
    held = 0
    for step in range(1, _longest_run(keyed, other_bits)):
        second = keyed[step : step + _AT_ONCE]
        first = keyed[: len(second)]
        differ = first ^ second
        near = np.flatnonzero(np.bitwise_count(differ) <= max_bits)
        if not len(near):
            continue
        differ = differ[near]
        is_first = differ < np.uint64(1 << other_bits)
        for block in table.must_differ:
            is_first &= (differ & block) != 0
        near = near[is_first]
        found.append((first[near], second[near]))
        held += len(near)
        if held > min(_AT_ONCE // 4, len(keyed)):
            yield _joined(found)
            found, held = [], 0
    if found:
        yield _joined(found)


def _longest_run(keyed: NDArray[np.uint64], other_bits: int) -> int:
    """How many sorted hashes have the same key, at most, of keys that the first `_AT_ONCE` have."""
    keys = keyed[:_AT_ONCE] >> np.uint64(other_bits)
    begins = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    end = np.searchsorted(keyed, keyed[len(keys) - 1] | np.uint64((1 << other_bits) - 1), side="right")
    return int(np.diff(begins, prepend=0, append=end).max())


def _joined(pairs: Sequence[tuple[NDArray[np.uint64], ...]]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    first, second = map(np.concatenate, zip(*pairs, strict=True))
    return first, second


def _moved(hashes: NDArray[np.uint64], moves: Sequence[tuple[int, int, int]]) -> NDArray[np.uint64]:
    """The hashes with runs of bits in other places: of each (from, to, size), counted from the lowest bit."""
    moved = np.zeros_like(hashes)
    for at, to, size in moves:
        moved |= ((hashes >> np.uint64(at)) & np.uint64((1 << size) - 1)) << np.uint64(to)
    return moved


@dataclass(frozen=True)
class Table:
    """An order to sort by. `moves`: (from, to, size) of runs of bits, which bring those of the key to the top.
    `must_differ`: the bits, so moved, of blocks in any of which two hashes that agree are found by an earlier table."""

    key_bits: int
    moves: tuple[tuple[int, int, int], ...]
    must_differ: tuple[np.uint64, ...]


def _table(edges: Sequence[int], key: Sequence[int]) -> Table:
    """`edges`: where the blocks begin, and the end of the last; `key`: the numbers of those to sort by."""
    moves: list[tuple[int, int, int]] = []
    must_differ: list[np.uint64] = []
    to = HASH_BITS
    others = [block for block in range(len(edges) - 1) if block not in key]
    for block in (*reversed(key), *reversed(others)):
        at, size = edges[block], edges[block + 1] - edges[block]
        to -= size
        if block < max(key) and block not in key:
            must_differ.append(np.uint64((1 << size) - 1) << np.uint64(to))
        if moves and moves[-1][0] == at + size:  # the block above is just before: one run
            size += moves.pop()[2]
        moves.append((at, to, size))
    return Table(sum(edges[block + 1] - edges[block] for block in key), tuple(moves), tuple(must_differ))


def tables_for(count: int, max_bits: int) -> list[Table]:
    """More blocks in all make longer keys, which fewer hashes share, and more tables: their number is that which costs
    the least."""

    def cost(blocks: int) -> float:
        sharing = count / 2 ** (HASH_BITS * (blocks - max_bits) / blocks)
        steps = sharing + 5 * math.sqrt(sharing)  # to the end of the longest run in a cacheful
        return math.comb(blocks, max_bits) * (1 + steps / _STEPS_PER_SORT)

    blocks = min(range(max_bits + 1, HASH_BITS + 1), key=cost)
    edges = [round(i * HASH_BITS / blocks) for i in range(blocks + 1)]
    return [_table(edges, key) for key in itertools.combinations(range(blocks), blocks - max_bits)]
