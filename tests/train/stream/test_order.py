"""The order is a permutation, stays in its windows, and mixes in proportion."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.stream.order import BLOCK, EpochOrder, Mixture, epoch_counts

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any)


def order(counts: list[int], window: int, epoch: int = 0, shuffled: bool = True) -> EpochOrder:
    return EpochOrder(np.cumsum([0, *counts]), window, 7, 0, epoch, shuffled)


@given(counts=sizes, window=st.integers(1, 8), epoch=st.integers(0, 5))
def test_every_sample_comes_once_and_from_a_shard_of_its_window(counts, window, epoch):
    made = order(counts, window, epoch)
    samples = made.samples(np.arange(len(made)))
    assert sorted(samples) == list(range(sum(counts)))
    shards = np.searchsorted(np.cumsum(counts), samples, side="right")
    for index, shard in enumerate(shards):
        assert shard in made.shards_of(made.window_of(index))
    read = [s for w in range(made.windows) for s in made.shards_of(w)]
    assert len(read) == len(set(read))


@given(counts=sizes, window=st.integers(1, 8), data=st.data())
def test_any_place_can_be_asked_for_alone(counts, window, data):
    whole = order(counts, window).samples(np.arange(sum(counts)))
    places = np.array(data.draw(st.lists(st.integers(0, sum(counts) - 1), min_size=1, max_size=20)))
    assert order(counts, window).samples(places).tolist() == whole[places].tolist()


def test_epochs_differ_and_unshuffled_is_the_order_on_disk():
    counts = [50] * 20
    first, second = (order(counts, 4, epoch).samples(np.arange(1000)) for epoch in (0, 1))
    assert (first == second).mean() < 0.02
    assert order(counts, 4, shuffled=False).samples(np.arange(1000)).tolist() == list(range(1000))


def test_few_neighbors_on_disk_are_neighbors_in_the_stream():
    counts, window = [100] * 40, 8
    samples = order(counts, window).samples(np.arange(4000))
    neighbors = (np.abs(np.diff(samples)) == 1).mean()
    assert neighbors < 3 * 2 / (window * 100)


def test_the_order_stays_what_it_was_or_saved_states_would_point_elsewhere():
    assert order([5, 3, 4], 2, epoch=1).samples(np.arange(12)).tolist() == [5, 2, 7, 3, 0, 1, 4, 6, 11, 8, 10, 9]


@given(
    counts=st.lists(st.integers(0, 3000), min_size=1, max_size=5).filter(any),
    epoch=st.integers(0, 3),
    shuffled=st.booleans(),
)
def test_a_mixture_takes_each_source_in_its_own_order_and_in_proportion(counts, epoch, shuffled):
    mixture = Mixture(counts, 3, shuffled)
    sources, ordinals = mixture.locate(epoch, np.arange(sum(counts)))
    for source, count in enumerate(counts):
        assert ordinals[sources == source].tolist() == list(range(count))
        if shuffled:
            for end in range(BLOCK, sum(counts), BLOCK):
                assert abs((sources[:end] == source).sum() - count * end / sum(counts)) < len(counts)


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=6),
    weights=st.lists(st.floats(0.01, 10), min_size=6, max_size=6),
)
def test_weights_share_out_every_sample(sizes, weights):
    weights = weights[: len(sizes)]
    counts = epoch_counts(sizes, weights, [1.0] * len(sizes))
    assert sum(counts) == sum(sizes)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - sum(sizes) * weight / sum(weights)) < 1 + 1e-6
    assert epoch_counts(sizes, None, [2.0] * len(sizes)) == [2 * size for size in sizes]
