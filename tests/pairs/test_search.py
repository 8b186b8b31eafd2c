"""The nearest entities, and how alike two of them are, against slow searches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from datapipe.pairs import clips, embed
from datapipe.pairs.clips import clip_neighbors
from datapipe.pairs.embed import PatchReader, SubjectPatches, embeddings_name, patches_name
from datapipe.pairs.files import Entities, put_table
from datapipe.pairs.scores import aligned, candidates, patch_similarity
from datapipe.pairs.search import Neighbors, Vectors, joined, parts_of, search, train_index
from datapipe.pairs.settings import SearchSettings
from datapipe.shards import Store


def vectors(count: int, dims: int = 16, seed: int = 0) -> Vectors:
    return unit(np.random.default_rng(seed).standard_normal((count, dims)))


def unit(every: NDArray[Any]) -> Vectors:
    found: Vectors = (every / np.linalg.norm(every, axis=1, keepdims=True)).astype(np.float32)
    return found


def test_one_list_is_an_exact_search():
    every = vectors(200)
    settings = SearchSettings(neighbors=5, floor=0.3)
    index = train_index(every, 1)
    index.add_with_ids(every, np.arange(200))
    found = search(index, every, 0, settings)
    cosine = every @ every.T
    np.fill_diagonal(cosine, -1)
    for one in range(200):
        near = [value for value in np.sort(cosine[one])[::-1][:5] if value >= 0.3]
        assert np.allclose(cosine[one, found.neighbor[found.of == one]], near, atol=2e-3), "vectors are kept as float16"
        assert found.rank[found.of == one].tolist() == list(range(1, len(near) + 1))


def test_parts_of_the_index_give_what_the_whole_gives():
    every = vectors(300)
    settings = SearchSettings(neighbors=4, floor=-1)
    shards = [(0, 0), (3, 120), (5, 120), (7, 250)]
    parts = parts_of(shards, 300, part_entities=140)
    assert parts == [[(0, 0), (3, 120)], [(5, 120)], [(7, 250)]]
    found = []
    for start, stop in ((0, 120), (120, 250), (250, 300)):
        index = train_index(every, 1)
        index.add_with_ids(every[start:stop], np.arange(start, stop))
        found.append(search(index, every, 0, settings))
    whole = train_index(every, 1)
    whole.add_with_ids(every, np.arange(300))
    expected, got = search(whole, every, 0, settings), joined(found, 4)
    assert (expected.neighbor == got.neighbor).all() and (expected.rank == got.rank).all()


def test_inverted_lists_find_nearly_all():
    centers = vectors(50, seed=1)
    every = unit(centers[np.arange(2000) % 50] + 0.1 * vectors(2000, seed=2))
    index = train_index(every, 40)
    index.add_with_ids(every, np.arange(2000))
    found = search(index, every, 0, SearchSettings(neighbors=5, floor=0.5, probes=4))
    exact = train_index(every, 1)
    exact.add_with_ids(every, np.arange(2000))
    expected = search(exact, every, 0, SearchSettings(neighbors=5, floor=0.5))
    edges, right = (set(zip(n.of.tolist(), n.neighbor.tolist(), strict=True)) for n in (found, expected))
    assert len(edges & right) > 0.95 * len(right)


def test_candidates_tell_ranks_both_ways():
    of, neighbor = np.array([[0, 0, 2, 1], [2, 1, 0, 2]])
    found = Neighbors(of, neighbor, np.array([0.9, 0.8, 0.9, 0.7], np.float32), np.array([1, 2, 1, 1], np.int16))
    pairs = candidates(found, 3)
    assert list(zip(pairs.a, pairs.b, pairs.rank_a, pairs.rank_b, strict=True)) == [
        (0, 1, 2, 0),
        (0, 2, 1, 1),
        (1, 2, 1, 0),
    ]


def test_an_edge_that_was_found_twice_counts_once():
    of, neighbor = np.array([[0, 0, 1], [1, 1, 0]])
    found = Neighbors(of, neighbor, np.array([0.9, 0.9, 0.9], np.float32), np.array([7, 2, 1], np.int16))
    pairs = candidates(found, 2)
    assert len(pairs) == 1 and (pairs.rank_a[0], pairs.rank_b[0]) == (2, 1)


def test_a_clip_is_searched_for_frames_that_are_far_in_time(tmp_path):
    every = unit(np.ones((6, 4)) + 0.01 * vectors(6, 4))
    folder = Store(str(tmp_path))
    for shard, part in enumerate((slice(0, 4), slice(4, 6))):
        put_table(folder, embeddings_name(shard), pa.table({"embedding": list(every[part].astype(np.float16))}), "")
    films = np.array(["a.mp4", "", "a.mp4", "b.mp4", "a.mp4", "b.mp4"], object)
    time_s = np.array([0, np.nan, 0.4, 0, 2, 0.2])
    rows = np.arange(6)
    entities = Entities(
        np.array([0, 0, 0, 0, 1, 1], np.int32),
        rows,
        np.zeros(6, np.int32),
        np.zeros(6, np.uint64),
        films,
        films,
        time_s,
    )
    found = clip_neighbors(folder, entities, SearchSettings(), min_seconds=1)
    assert sorted(zip(found.of.tolist(), found.neighbor.tolist(), strict=True)) == [(0, 4), (2, 4), (4, 0), (4, 2)]


@pytest.mark.parametrize("at_once", [1, 70, 10_000])
def test_a_clip_in_blocks_has_the_nearest_of_a_slow_search(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(clips, "_CELLS_AT_ONCE", at_once)
    every = vectors(30, 4).astype(np.float16)
    put_table(Store(str(tmp_path)), embeddings_name(0), pa.table({"embedding": list(every)}), "")
    zeros, name, time_s = np.zeros(30, np.int32), np.array(["a.mp4"] * 30, object), np.arange(30) / 4
    entities = Entities(zeros, np.arange(30), zeros, zeros.astype(np.uint64), name, name, time_s)
    found = clip_neighbors(Store(str(tmp_path)), entities, SearchSettings(neighbors=3, floor=0.2), min_seconds=1)
    cosine = every.astype(np.float32) @ every.astype(np.float32).T
    cosine[np.abs(time_s[:, None] - time_s) < 1] = -1
    for one in range(30):
        slow = [int(n) for n in np.argsort(-cosine[one])[:3] if cosine[one, n] >= 0.2]
        assert found.neighbor[found.of == one].tolist() == slow
        assert found.rank[found.of == one].tolist() == list(range(1, len(slow) + 1))


def test_patches_are_read_in_any_order_while_few_shards_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_SHARDS_AT_ONCE", 1)
    folder, cells = Store(str(tmp_path)), [[[0, 3], [1]], [[2], [0, 1, 2]]]
    patches = [[vectors(len(c), 8, seed=10 * s + i).astype(np.float16) for i, c in enumerate(cells[s])] for s in (0, 1)]
    for shard in (0, 1):
        table = pa.table({"cells": pa.array(cells[shard], pa.list_(pa.uint8())), "embedding": list(vectors(2, 8))})
        put_table(folder, embeddings_name(shard), table, "")
        folder.put(patches_name(shard), b"".join(p.tobytes() for p in patches[shard]))
    read = PatchReader(folder, grid=2)([1, 0, 1, 0], [1, 0, 0, 1])
    for i, (shard, position) in enumerate([(1, 1), (0, 0), (1, 0), (0, 1)]):
        assert np.flatnonzero(read.shown[i]).tolist() == cells[shard][position]
        assert np.allclose(read.features[i, read.shown[i]], patches[shard][position], atol=2e-3)


def test_patches_are_compared_with_the_most_alike_inside_the_other_mask():
    rng = np.random.default_rng(0)
    one, other = (SubjectPatches(vectors(6 * 9, 8, seed).reshape(6, 9, 8), rng.random((6, 9)) < 0.6) for seed in (3, 4))
    one.shown[:, 0] = other.shown[:, 0] = True
    similarity, same_place = patch_similarity(one, other), aligned(one, other)
    for i in range(6):
        a, b = one.features[i][one.shown[i]], other.features[i][other.shown[i]]
        slow = (np.mean([max(b @ p) for p in a]) + np.mean([max(a @ p) for p in b])) / 2
        assert abs(similarity[i] - slow) < 1e-5
        both, either = one.shown[i] & other.shown[i], one.shown[i] | other.shown[i]
        at_place = sum(float(one.features[i, c] @ other.features[i, c]) for c in np.flatnonzero(both)) / either.sum()
        assert abs(same_place[i] - at_place) < 1e-5
