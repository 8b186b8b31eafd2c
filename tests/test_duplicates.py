"""Duplicates are those that a plain comparison of every row with every earlier one would find."""

from __future__ import annotations

import tracemalloc
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe import duplicate_search
from datapipe.deduplicate import DuplicatesBySlice, find_all_duplicates, mark_duplicates
from datapipe.duplicate_search import exact_duplicates, near_duplicates, paired
from datapipe.duplicate_tables import swap_bits, tables_for
from datapipe.plan import Part
from datapipe.schema import Sample, Slice
from datapipe.shards import Store, write_shard
from datapipe.stages.screen import ScreenSettings
from tests.conftest import jpeg


def slowly(values, same):
    """The definition: each row against every earlier row that is no duplicate itself."""
    original = {}
    for later in range(len(values)):
        for earlier in range(later):
            if earlier not in original and same(values[earlier], values[later]):
                original[later] = earlier
                break
    return original


@given(st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=12))
def test_exact_duplicates_are_found_as_by_definition(digests):
    duplicates, originals = exact_duplicates(np.array(digests, "S32"))
    assert dict(zip(duplicates.tolist(), originals.tolist(), strict=True)) == slowly(digests, lambda a, b: a == b)


@given(
    centres=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3),
    rows=st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 63), max_size=12)), max_size=24),
    max_bits=st.integers(0, 10),
)
def test_near_duplicates_are_found_as_by_definition(centres, rows, max_bits):
    hashes = [centres[c % len(centres)] ^ sum(1 << bit for bit in flipped) for c, flipped in rows]
    duplicates, originals = near_duplicates(np.array(hashes, np.uint64), max_bits)
    expected = slowly(hashes, lambda a, b: (a ^ b).bit_count() <= max_bits)
    assert dict(zip(duplicates.tolist(), originals.tolist(), strict=True)) == expected


def test_hashes_are_collected_without_a_look_at_the_whole_folder_for_each_shard(tmp_path, provenance, monkeypatch):
    store = Store(str(tmp_path))
    for index in range(20):
        image = Sample(row=index, image=jpeg(8, 8, 0), sha256=f"{index % 10:064x}", phash=index, width=8, height=8)
        write_shard(store, "raw", Slice(index, (image,)), provenance)
    looks = Mock(side_effect=Store.names, autospec=True)
    monkeypatch.setattr(Store, "names", lambda self: looks(self))
    find_all_duplicates(store, ScreenSettings(near_duplicate_bits=None), [Part(20, "input")])
    assert looks.call_count <= 3
    assert [row for row, *_ in DuplicatesBySlice(store).of(range(20))] == list(range(10, 20))


def test_near_duplicates_are_found_among_many():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    planted = np.arange(50_000, 51_000)
    for row in planted:
        flips = np.bitwise_or.reduce(np.uint64(1) << rng.choice(64, 4, replace=False).astype(np.uint64))
        hashes[row] = hashes[row - 50_000] ^ flips
    duplicates, originals = near_duplicates(hashes, 4)
    np.testing.assert_array_equal(duplicates, planted)
    np.testing.assert_array_equal(originals, planted - 50_000)


def test_a_chain_in_which_each_is_near_only_the_next_keeps_every_other_one():
    bits = np.arange(64, dtype=np.uint64)
    hashes = np.bitwise_xor.accumulate(np.uint64(1) << bits)  # 1, 11, 111, ...
    duplicates, originals = near_duplicates(hashes, 1)
    np.testing.assert_array_equal(duplicates, np.arange(1, 64, 2))
    np.testing.assert_array_equal(originals, np.arange(0, 64, 2))


def test_a_cluster_does_not_cost_memory_for_each_of_its_pairs():
    rng = np.random.default_rng(0)
    flips = np.uint64(1) << rng.permuted(np.tile(np.arange(64, dtype=np.uint64), (3_000, 1)), axis=1)[:, :2]
    hashes = np.unique(np.bitwise_or.reduce(flips, axis=1))  # Each within 4 bits of each.
    pairs = len(hashes) * (len(hashes) - 1) // 2
    tables_for(len(hashes), 4)  # Which tables is found out once.
    tracemalloc.start()
    duplicates, originals = near_duplicates(hashes, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(duplicates) == len(hashes) - 1 and not originals.any()
    assert peak < pairs


def test_more_rows_are_met_with_longer_keys():
    short, long = tables_for(1_000, 4), tables_for(100_000_000, 4)
    assert max(table.key_bits for table in short) < min(table.key_bits for table in long)
    assert len(long) <= 70


@pytest.mark.parametrize(("max_bits", "count"), [(0, 10), (1, 10**6), (4, 10**6), (4, 10**8), (8, 10**7), (10, 10**6)])
def test_whatever_bits_differ_the_key_of_a_table_is_without_them(max_bits, count):
    rng = np.random.default_rng(max_bits)
    hashes = rng.integers(0, 2**64, 500, dtype=np.uint64)
    bits = np.uint64(1) << rng.permuted(np.tile(np.arange(64, dtype=np.uint64), (500, 1)), axis=1)
    others = hashes ^ np.bitwise_or.reduce(bits[:, :max_bits], axis=1, initial=0)
    met = np.zeros(500, bool)
    for table in tables_for(count, max_bits):
        first, second = hashes.copy(), others.copy()
        swap_bits(first, table.swaps)
        swap_bits(second, table.swaps)
        np.testing.assert_array_equal(np.bitwise_count(first ^ second), max_bits)
        met |= first >> np.uint64(64 - table.key_bits) == second >> np.uint64(64 - table.key_bits)
        swap_bits(first, table.swaps)
        np.testing.assert_array_equal(first, hashes)
    assert met.all()


@pytest.mark.parametrize("max_bits", [2, 8, 10])
def test_distances_of_every_size_are_found_across_the_cachefuls(monkeypatch, max_bits):
    monkeypatch.setattr(duplicate_search, "_AT_ONCE", 64)
    rng = np.random.default_rng(1)
    centers = rng.integers(0, 2**64, 40, dtype=np.uint64)
    flips = np.uint64(1) << rng.permuted(np.tile(np.arange(64, dtype=np.uint64), (400, 1)), axis=1)
    hashes = np.array(
        [centers[i % 40] ^ np.bitwise_or.reduce(flips[i, : i % (max_bits + 4)], initial=0) for i in range(400)],
        np.uint64,
    )
    duplicates, originals = near_duplicates(hashes, max_bits)
    expected = slowly(hashes.tolist(), lambda a, b: (a ^ b).bit_count() <= max_bits)
    assert dict(zip(duplicates.tolist(), originals.tolist(), strict=True)) == expected


def test_each_pair_is_found_by_one_table_and_by_no_other():
    hashes = np.random.default_rng(2).integers(0, 2**64, 2000, dtype=np.uint64)
    hashes[:50] = hashes[50:100] ^ np.uint64(0b1011)
    hashes.sort()
    tables = tables_for(len(hashes), 4)
    found = np.array([paired(hashes, 4, [table]) for table in tables])
    assert found.sum() == found.any(axis=0).sum() == 100
    np.testing.assert_array_equal(found.any(axis=0), paired(hashes, 4))


def test_of_near_duplicates_the_largest_is_kept_and_of_equally_large_ones_the_first(tmp_path, provenance):
    """Row 0: a thumbnail of row 2. Rows 3 and 4: the same bytes. Row 5: like row 1, and as large."""
    hashes, sides = (0, 2**40 - 1, 1, 255 << 50, 255 << 50, 2**40 - 2), (20, 90, 80, 50, 50, 90)
    samples = [
        Sample(
            row=row,
            image=jpeg(seed=row),
            width=48,
            height=32,
            original_width=side,
            original_height=side,
            sha256=f"{min(row, 3) if row < 5 else row:064x}",
            phash=phash,
        )
        for row, (phash, side) in enumerate(zip(hashes, sides, strict=True))
    ]
    store = Store(str(tmp_path))
    for index in range(2):
        write_shard(store, "raw", Slice(index, tuple(samples[3 * index : 3 * index + 3])), provenance)
    find_all_duplicates(store, ScreenSettings(), [Part(6, "input")])
    by_slice = DuplicatesBySlice(store)
    assert [by_slice.of(range(3)), by_slice.of(range(3, 6))] == [[(0, 2, False)], [(4, 3, True), (5, 1, False)]]
    dropped = mark_duplicates(samples[:3], by_slice.of(range(3)))
    assert [s.verdict.detail for s in dropped if s.verdict] == ["of 0000000002"]
