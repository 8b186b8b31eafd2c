"""Duplicates in the whole input: exact ones by SHA-256, near ones by perceptual hashes that differ in few bits.

A row is a duplicate of the first earlier row that matches it and is no duplicate itself; which rows are earlier is the
caller's to say. So the rows that are kept do not depend on how the input is cut into slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from datapipe.duplicate_tables import HASH_BITS, Table, Words, swap_bits, tables_for

_PAIRS_HELD = 4
"""Pairs that are held for each hash that has any."""
_AT_ONCE = 1 << 16
"""Hashes whose neighbors are compared together: few enough for a core's own cache, and so many that numpy's calls do
not count."""
_FEW = 8
"""Where fewer than one in so many hashes has a neighbor left, these alone are looked at."""

Positions = NDArray[np.int64]
Pair = tuple[Words, Words]

FindPaired = Callable[[Words, int], NDArray[np.bool_]]


def exact_duplicates(sha256: NDArray[np.bytes_]) -> tuple[Positions, Positions]:
    """Among (N,) digests in order: positions of the duplicates, ascending, and of their originals; (M,) int64
    each."""
    _, first, group = np.unique(sha256, return_index=True, return_inverse=True)
    return _duplicates_from(first[group])


def near_duplicates(phash: Words, max_bits: int, find_paired: FindPaired | None = None) -> tuple[Positions, Positions]:
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


def _rows_of(wanted: Words, phash: Words) -> Positions:
    """Where among (N,) hashes those are that `wanted` names, and a few others: those that agree with one of them in
    their highest bits, and with one in their lowest."""
    bits = np.uint64(min(len(wanted).bit_length() + 3, 30))
    rest = np.uint64(HASH_BITS) - bits
    lowest = (np.uint64(1) << bits) - np.uint64(1)
    high, low = np.zeros((2, 1 << int(bits)), bool)
    high[wanted >> rest] = True
    low[wanted & lowest] = True
    found = []
    for start in range(0, len(phash), _AT_ONCE):
        some = phash[start : start + _AT_ONCE]
        rows = np.flatnonzero(high[some >> rest])
        found.append(rows[low[some[rows] & lowest]] + start)
    return np.concatenate([np.empty(0, np.int64), *found])


BYTES_PER_HASH = 12
"""Memory of `paired`: a table's order of the hashes, what it found, and pairs that are not marked yet."""


def paired(hashes: Words, max_bits: int, tables: Sequence[Table] | None = None) -> NDArray[np.bool_]:
    """Which of (N,) distinct hashes, ascending, have another in reach, as far as these tables find it; by default all
    that it takes. Takes `BYTES_PER_HASH` of memory for each."""
    found = np.zeros(len(hashes), bool)
    held: list[Words] = []
    count = 0
    for first, second in _pairs(hashes, max_bits, tables):
        held += first, second
        count += len(first)
        if count > len(hashes) // 16:
            _mark(found, hashes, held)
            held, count = [], 0
    _mark(found, hashes, held)
    return found


def _mark(found: NDArray[np.bool_], hashes: Words, some: Sequence[Words]) -> None:
    """Marks the positions of some of the ascending hashes, which are looked up in their order, as memory likes it."""
    found[np.searchsorted(hashes, np.sort(np.concatenate([hashes[:0], *some])))] = True


def _originals(phash: Words, max_bits: int) -> Positions:
    """(N,) hashes in order -> (N,) the first earlier one in reach that is no duplicate, or the hash itself."""
    hashes, first, group = np.unique(phash, return_index=True, return_inverse=True)
    by_row = np.argsort(first)
    rank = np.empty_like(by_row)
    rank[by_row] = np.arange(len(by_row))
    # Rows with the same hash share their fate, so only distinct hashes are compared, in order of first appearance.
    original: Positions = first[by_row][_greedy(hashes[by_row], max_bits)][rank[group]]
    return original


def _greedy(hashes: Words, max_bits: int) -> Positions:
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


def _pairs_again(hashes: Words, max_bits: int) -> Callable[[], Iterator[tuple[Positions, Positions]]]:
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


def _pairs_within(hashes: Words, max_bits: int) -> Iterator[tuple[Positions, Positions]]:
    """Pairs of positions i < j of distinct hashes at a Hamming distance of 1 to `max_bits`, each once."""
    by_hash = np.argsort(hashes)
    in_order = hashes[by_hash]
    for pair in _pairs(hashes, max_bits):
        a, b = (by_hash[np.searchsorted(in_order, one)] for one in pair)
        yield np.minimum(a, b), np.maximum(a, b)


def _pairs(hashes: Words, max_bits: int, tables: Sequence[Table] | None = None) -> Iterator[Pair]:
    """Pairs of distinct hashes at a Hamming distance of 1 to `max_bits`, each once; as far as `tables` find them, by
    default all."""
    if not max_bits or len(hashes) < 2:
        return
    keyed = np.empty_like(hashes)
    for table in tables_for(len(hashes), max_bits) if tables is None else tables:
        keyed[:] = hashes
        yield from _pairs_of_table(keyed, table, max_bits)


def _pairs_of_table(keyed: Words, table: Table, max_bits: int) -> Iterator[Pair]:
    """Pairs of hashes that agree in the table's key, and in that of no earlier one, and differ in at most `max_bits`
    bits. Leaves the hashes in the table's order.

    The other bits of a hash stand behind its key and are sorted with it: two bits changing places change no distance,
    so that neighbors are compared where they lie, one cacheful after another.
    """
    for start in range(0, len(keyed), _AT_ONCE):
        swap_bits(keyed[start : start + _AT_ONCE], table.swaps)
    keyed.sort()
    held: list[Pair] = []
    count = 0
    for start in range(0, len(keyed), _AT_ONCE):
        for pair in _near_neighbors(keyed[start:], table.key_bits, max_bits):
            if not len(pair[0]):
                continue
            held.append(pair)
            count += len(pair[0])
            if count > min(_AT_ONCE // 4, len(keyed)):
                yield _found_first(held, table)
                held, count = [], 0
    if held:
        yield _found_first(held, table)


def _near_neighbors(keyed: Words, key_bits: int, max_bits: int) -> Iterator[Pair]:
    """Pairs of sorted hashes that agree in their highest bits and differ in few, of which the first is among the first
    `_AT_ONCE`: each is compared with the next, the one after, and so on."""
    other_key = np.uint64(1 << (HASH_BITS - key_bits))
    ahead = keyed[:_AT_ONCE]
    same_key = np.ones(len(ahead), bool)
    step = 1
    while step < len(keyed) and np.count_nonzero(same_key) * _FEW >= len(ahead):
        second = keyed[step : step + _AT_ONCE]
        first = ahead[: len(second)]
        same_key, near = _compared(first, second, other_key, max_bits)
        yield first[near], second[near]
        step += 1
    at = np.flatnonzero(same_key)
    while len(at := at[at < len(keyed) - step]):
        first, second = keyed[at], keyed[at + step]
        same_key, near = _compared(first, second, other_key, max_bits)
        yield first[near], second[near]
        at = at[same_key]  # of a hash whose neighbor has another key, the later ones have it, too
        step += 1


def _compared(first: Words, second: Words, other_key: np.uint64, max_bits: int) -> tuple[NDArray[np.bool_], Positions]:
    """Which of these pairs agree in their keys; and the positions of those that differ in few bits, too."""
    differ = first ^ second
    same_key = differ < other_key
    return same_key, np.flatnonzero(same_key & (np.bitwise_count(differ) <= max_bits))


def _found_first(pairs: Sequence[Pair], table: Table) -> Pair:
    """Those that no earlier table finds, as they were before bits changed places."""
    first, second = map(np.concatenate, zip(*pairs, strict=True))
    differ = first ^ second
    for key in table.earlier_keys:
        is_new = (differ & key) != 0
        first, second, differ = first[is_new], second[is_new], differ[is_new]
    swap_bits(first, table.swaps)
    swap_bits(second, table.swaps)
    return first, second
