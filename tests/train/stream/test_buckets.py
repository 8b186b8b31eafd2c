"""With buckets each step has one shape, the nearest to its images', and the order keeps all its other promises."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from subject_diffusion.errors import RunError
from tests.conftest import jpeg
from tests.train.datasets import digest, ids, sample, streams, take
from tests.train.stream.conftest import SIZES
from train.stream.buckets import BucketedOrder, Buckets, bucketed_order
from train.stream.dataset import Stream
from train.stream.source import Source
from train.stream.tar_sample import CorruptSampleError, RawSample
from train.stream.transform import SubjectTransform

BUCKETS = Buckets(sizes_px=(32,), step_px=8)
"""Of images as `sample` has them, 1.1 to 1.8 times as wide as high, some are squares to it and some 24 x 40."""
TRANSFORM = SubjectTransform(size_px=16, max_subjects=2)


def bucketed(images: list[list[tuple[int, int]]], counts: list[int], step: int, window: int = 2) -> BucketedOrder:
    """images: of each source, in shards of five."""
    shapes = [np.array(own, np.int32).reshape(-1, 2) for own in images]
    firsts = [np.minimum(np.arange(-(-len(own) // 5) + 1) * 5, len(own)) for own in images]
    return bucketed_order(Buckets(sizes_px=(32, 64), step_px=8), shapes, firsts, counts, step, window, seed=3)


def steps_of(order: BucketedOrder, epoch: int, step: int) -> list[Any]:
    return [order.locate(epoch, np.arange(at, at + step)) for at in range(0, order.length(epoch), step)]


kinds = st.sampled_from([(40, 40), (30, 50), (50, 30), (100, 90), (200, 100), (9, 90)])
images = st.lists(kinds, min_size=1, max_size=40)


@settings(max_examples=60)
@given(own=images, step=st.integers(1, 9), epochs=st.integers(1, 6))
def test_every_image_comes_once_an_epoch_but_for_what_fills_no_step_and_is_carried(own, step, epochs):
    order = bucketed([own], [len(own)], step)
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        for places in steps_of(order, epoch, step):
            members = next(bucket.members[0] for bucket in order.buckets if bucket.shape == places.shape)
            assert np.isin(places.samples, members).all()
            seen.update(places.samples.tolist())
        for bucket in order.buckets:
            waiting = (epoch + 1) * len(bucket.order) - sum(seen[s] for s in bucket.members[0].tolist())
            assert 0 <= waiting < step
            if len(bucket.order) >= step:
                assert all(seen[s] in (epoch, epoch + 1) for s in bucket.members[0].tolist())
    assert sorted(s for bucket in order.buckets for s in bucket.members[0].tolist()) == list(range(len(own)))
    assert len(order.buckets) == 1 or all(len(bucket.order) >= step for bucket in order.buckets)


@settings(max_examples=40)
@given(sources=st.lists(images, min_size=1, max_size=3), step=st.integers(1, 6), data=st.data())
def test_sources_are_mixed_in_each_bucket_and_any_place_can_be_asked_for_alone(sources, step, data):
    epoch = data.draw(st.integers(0, 4))
    counts = [data.draw(st.integers(0, 2 * len(own))) for own in sources]
    if sum(counts) < step:
        return
    whole = steps_of(bucketed(sources, counts, step), epoch, step)
    assert sum(len(bucket.order) for bucket in bucketed(sources, counts, step).buckets) == sum(counts)
    number = data.draw(st.integers(0, len(whole) - 1)) if whole else 0
    for place in range(step if whole else 0):
        alone = bucketed(sources, counts, step).locate(epoch, np.array([number * step + place]))
        assert (alone.sources[0], alone.samples[0]) == (whole[number].sources[place], whole[number].samples[place])
        assert alone.shape == whole[number].shape
        assert int(alone.samples[0]) in alone.alike[alone.sources[0]]


def test_the_order_stays_what_it_was_or_saved_states_would_point_elsewhere():
    order = bucketed([[(40, 40), (30, 50)] * 4], [8], 3)
    found = [(epoch, places.shape, places.samples.tolist()) for epoch in (0, 1) for places in steps_of(order, epoch, 3)]
    assert found == [
        (0, (32, 32), [2, 0, 4]), (0, (24, 40), [1, 7, 3]), (1, (32, 32), [6, 4, 6]), (1, (24, 40), [5, 3, 5])
    ]  # fmt: skip


def test_shapes_keep_the_area_and_the_nearest_aspect_of_the_largest_size_that_is_filled_is_taken():
    rule = Buckets(sizes_px=(512, 256))
    assert rule.shapes(512) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    taken = [(512, 512), (511, 511), (480, 640), (100, 90), (2000, 1000), (1000, 5000)]
    every = rule.every_shape()
    assert [every[place] for place in rule.nearest(np.array(taken, np.int32))] == [
        (512, 512), (256, 256), (448, 576), (256, 256), (640, 384), (384, 640)
    ]  # fmt: skip
    with pytest.raises(ValidationError, match="sizes_px 500 is no multiple of step_px 64"):
        Buckets(sizes_px=(500,))


def test_an_aspect_too_rare_to_fill_a_step_goes_to_the_nearest_and_is_counted():
    order = bucketed([[(40, 40)] * 9 + [(30, 50)] * 2 + [(50, 30)] * 5], [16], 4)
    assert [(bucket.shape, len(bucket.order)) for bucket in order.buckets] == [((40, 24), 5), ((32, 32), 11)]
    assert order.described() == (
        "images are cut to height x width (images of an epoch): 40 x 24 (5), 32 x 32 (11); 2 of shapes too rare to "
        "fill a step go to the nearest"
    )


@settings(max_examples=12)
@given(
    step=st.sampled_from([6, 12]),
    window=st.integers(1, 4),
    stops=st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.integers(1, 5)), min_size=1, max_size=4),
)
def test_any_ranks_and_stops_give_one_sequence(dataset, cache, step, window, stops):
    make = streams(str(dataset), batch_size=6, window=window, cache=cache, buckets=BUCKETS, samples_per_step=step)
    resumed, state = [], None
    for ranks, count in stops:
        batches, state = take(count, ranks, 0, json.loads(json.dumps(state)), make)
        resumed += batches
    undisturbed, _ = take(len(resumed), 1, 0, None, make)
    assert ids(resumed) == ids(undisturbed)


def test_stopped_and_resumed_on_other_ranks_and_workers_the_batches_are_those_of_an_undisturbed_run(dataset, cache):
    sources = [Source(str(dataset), weight=0.5), Source(str(dataset), weight=0.5)]
    make = streams(sources, batch_size=12, transform=TRANSFORM, window=3, seed=5, cache=cache, buckets=BUCKETS)
    undisturbed, _ = take(14, ranks=1, workers=0, state=None, make=make)
    resumed, state = [], None
    for ranks, workers, count in ((1, 2, 4), (2, 1, 3), (3, 0, 7)):
        batches, state = take(count, ranks, workers, state, make)
        resumed += batches
    assert [digest(b) for b in resumed] == [digest(b) for b in undisturbed]
    assert {tuple(b["image"].shape[2:]) for b in undisturbed} == {(32, 32), (24, 40)}


def test_images_boxes_and_masks_are_cut_alike(dataset, cache):
    stream = Stream(str(dataset), 4, SubjectTransform(max_subjects=3), cache=cache, buckets=BUCKETS)
    shown = Counter[tuple[int, int]]()
    for batch in stream:
        height, width = batch["image"].shape[2:]
        for row, key in enumerate(batch["key"]):
            whole = sample(int(key))
            (nearest,) = BUCKETS.nearest(np.array([[whole.height, whole.width]], np.int32))
            assert BUCKETS.every_shape()[nearest] == (height, width)
            scale = max(height / whole.height, width / whole.width)
            for number, box, mask in zip(batch["entities"][row], batch["boxes"][row], batch["masks"][row], strict=True):
                assert tuple(mask.shape) == (height, width)
                if number < 0:
                    continue
                x1, y1, x2, y2 = np.round(box.numpy() * (width, height, width, height)).astype(int)
                entity = sample(int(key), entities=3).entities[number]
                assert y2 - y1 <= round((entity.box[3] - entity.box[1]) * scale) + 1
                assert mask[y1:y2, x1:x2].float().mean() > 0.8
                assert mask.sum() <= (x2 - x1 + 2) * (y2 - y1 + 2)
                shown[height, width] += 1
    assert min(shown[32, 32], shown[24, 40]) > 10


def test_a_corrupt_sample_is_replaced_by_one_of_its_bucket(dataset, cache):
    seen: set[tuple[str, tuple[int, int] | None]] = set()

    def refuse(raw: RawSample, rng: np.random.Generator) -> dict[str, float]:
        seen.add((raw.key, raw.shape))
        if int(raw.key) % 5 == 0:
            raise CorruptSampleError("refused")
        return {"draw": float(rng.random())}

    batches = list(Stream(str(dataset), 4, refuse, cache=cache, buckets=BUCKETS))
    assert sum(len(batch["replaced"]) for batch in batches) > 5
    assert {shape for _, shape in seen} == {(32, 32), (24, 40)}
    assert len(seen) == len({key for key, _ in seen}), "no sample was given in two shapes"


def test_an_epoch_has_as_many_batches_as_are_said_and_images_wait_for_the_next(dataset, cache):
    stream = Stream(str(dataset), 8, cache=cache, buckets=BUCKETS)
    said = [stream.batches(epoch) for epoch in range(8)]
    assert [len(list(stream)) for _ in range(8)] == said
    assert len(set(said)) > 1
    assert 8 * sum(SIZES) - 8 * sum(said) < 2 * 8


def test_a_state_of_other_buckets_or_steps_is_refused(dataset, cache):
    state = Stream(str(dataset), 4, cache=cache, buckets=BUCKETS, samples_per_step=8).state_dict()
    for others in (
        {"buckets": None},
        {"buckets": Buckets(sizes_px=(32,), step_px=16), "samples_per_step": 8},
        {"buckets": BUCKETS, "samples_per_step": 12},
    ):
        with pytest.raises(RunError, match="its order is another one"):
            Stream(str(dataset), 4, cache=cache, **others).load_state_dict(state)
    Stream(str(dataset), 2, cache=cache, buckets=BUCKETS, samples_per_step=8).load_state_dict(state)
    with pytest.raises(RunError, match="saved at 4, within 8 samples of one shape, whose rest is no multiple of"):
        Stream(str(dataset), 8, cache=cache, buckets=BUCKETS).load_state_dict(state | {"index": 4})


def test_what_buckets_cannot_be_made_of_is_refused_in_one_line(dataset, cache, tmp_path):
    with pytest.raises(RunError, match="leave buckets out"):
        Stream(str(dataset), 4, cache=cache, buckets=BUCKETS, mode="evaluate")
    with pytest.raises(RunError, match="samples_per_step 6 is no multiple of batch_size 4"):
        Stream(str(dataset), 4, cache=cache, buckets=BUCKETS, samples_per_step=6)
    with pytest.raises(RunError, match="65 samples do not fill a batch of 66"):
        Stream(str(dataset), 66, cache=cache, buckets=BUCKETS)
    with webdataset.TarWriter(str(tmp_path / "foreign.tar")) as writer:
        writer.write({"__key__": "0", "jpg": jpeg(seed=0)})
    with pytest.raises(RunError, match=r"foreign.tar: buckets need the images' sizes, from the sidecars"):
        Stream(str(tmp_path / "foreign.tar"), 1, cache=cache, buckets=BUCKETS)
