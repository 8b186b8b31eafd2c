"""A stream goes on exactly where it stopped, on any number of ranks and workers, and nothing upsets its order."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from datapipe.schema import RLE, Slice
from datapipe.shards import Store, write_shard
from subject_diffusion.errors import RunError, ShardError
from tests.toy import PROJECT
from tests.train.datasets import PROVENANCE, digest, ids, joined, sample, streams, take, through_epochs, write_dataset
from tests.train.stream.conftest import SIZES
from train.stream.dataset import Stream
from train.stream.filter import Filter
from train.stream.loader import StreamLoader
from train.stream.source import Source
from train.stream.tar_sample import CorruptSampleError, RawSample
from train.stream.transform import SubjectTransform

IMAGE_OF_ROW_1 = (33, 41)
"""Height and width of `sample(1)`."""
TRANSFORM = SubjectTransform(size_px=16, max_subjects=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("other"), (6, 20), first_row=1000)


@pytest.fixture(scope="module")
def mixed(dataset, other) -> list[Source]:
    return [Source(str(dataset), weight=0.7), Source(str(other), weight=0.3)]


@pytest.mark.parametrize("mixing", [False, True])
def test_stopped_and_resumed_on_other_ranks_and_workers_the_batches_are_those_of_an_undisturbed_run(
    dataset, mixed, cache, mixing
):
    make = streams(mixed if mixing else str(dataset), batch_size=12, transform=TRANSFORM, window=3, seed=5, cache=cache)
    undisturbed, _ = take(20, ranks=1, workers=0, state=None, make=make)
    resumed, state = [], None
    for ranks, workers, count in ((1, 3, 4), (2, 1, 3), (4, 0, 5), (3, 3, 4), (1, 1, 4)):
        batches, state = take(count, ranks, workers, json.loads(json.dumps(state)), make)
        resumed += batches
    assert ids(resumed) == ids(undisturbed)
    assert [digest(b) for b in resumed] == [digest(b) for b in undisturbed]


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 6),
    share=st.integers(1, 2),
    window=st.integers(1, 4),
    stops=st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.integers(1, 5)), min_size=1, max_size=4),
)
def test_any_shards_ranks_and_stops_give_one_sequence(tmp_path_factory, sizes, share, window, stops):
    folder = write_dataset(tmp_path_factory.mktemp("any"), sizes)
    make = streams(str(folder), batch_size=6 * share, window=window, cache=tmp_path_factory.mktemp("cache"))
    if sum(sizes) < 6 * share:
        with pytest.raises(RunError, match="do not fill a batch"):
            make(0, 1)
        return
    resumed, state = [], None
    for ranks, count in stops:
        batches, state = take(count, ranks, 0, state, make)
        resumed += batches
    undisturbed, _ = take(len(resumed), 1, 0, None, make)
    assert ids(resumed) == ids(undisturbed)
    epoch = len(make(0, 1))
    for start in range(0, len(resumed) - epoch + 1, epoch):
        seen = ids(resumed[start : start + epoch])
        assert len(seen) == len(set(seen))


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    ranks=st.integers(1, 4),
    share=st.integers(1, 3),
)
def test_evaluation_gives_each_sample_once_and_every_rank_as_many_batches(tmp_path_factory, sizes, ranks, share):
    folder = write_dataset(tmp_path_factory.mktemp("any"), sizes)
    make = streams(str(folder), batch_size=ranks * share, mode="evaluate", cache=tmp_path_factory.mktemp("cache"))
    by_rank = [list(make(rank, ranks)) for rank in range(ranks)]
    assert {len(batches) for batches in by_rank} == {len(make(0, ranks))}
    whole = [joined(parts) for parts in zip(*by_rank, strict=True)]
    valid = [key for batch in whole for key, real in zip(batch["key"], batch["valid"], strict=True) if real]
    assert len(valid) == sum(sizes)
    assert valid == sorted(set(valid))


def test_killed_and_started_again_with_other_workers_no_sample_is_lost_or_comes_twice(dataset, cache, tmp_path):
    checkpoint = tmp_path / "checkpoint.json"
    command = [sys.executable, "-m", "tests.train.stream.consumer", str(dataset), str(cache), str(checkpoint)]
    for workers, batches in ((2, 9), (0, 7), (3, 8)):
        process = subprocess.Popen(
            [*command, str(workers)], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        for _ in range(batches):
            assert process.stdout.readline() == "saved\n"
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not psutil.wait_procs(children, timeout=120)[1]
    seen = json.loads(checkpoint.read_text())["seen"]
    assert len(seen) >= 24 * 6
    undisturbed, _ = take(len(seen) // 6, 1, 0, None, streams(str(dataset), batch_size=6, cache=cache))
    assert seen == ids(undisturbed)


def test_every_epoch_of_a_dataset_gives_every_sample_in_another_order(dataset, cache):
    stream = Stream(str(dataset), 1, cache=cache)
    first, second = ids(list(stream)), ids(list(stream))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == sum(SIZES)
    assert first != second


def test_sources_are_mixed_by_weight_or_by_epochs(dataset, other, cache):
    few, many = sum((6, 20)), sum(SIZES)
    by_weight = Stream([Source(str(dataset), weight=1), Source(str(other), weight=3)], 1, cache=cache)
    sources = np.concatenate([b["source"].numpy() for b in by_weight])
    assert len(sources) == few + many
    assert abs((sources == 1).mean() - 0.75) < 0.02
    by_epochs = Stream([Source(str(dataset)), Source(str(other), epochs=2)], 1, cache=cache)
    seen = ids(list(by_epochs))
    assert len(seen) == many + 2 * few
    assert sorted(key for key in seen if int(key) >= 1000) == sorted(2 * [s for s in set(seen) if int(s) >= 1000])
    with pytest.raises(RunError, match="give each one a weight"):
        Stream([Source(str(dataset), weight=1), Source(str(other))], 1, cache=cache)
    with pytest.raises(RunError, match="no sample passes its filter"):
        Stream(
            [Source(str(dataset), weight=1), Source(str(other), weight=1, keep=Filter(min_entities=99))], 1, cache=cache
        )


def test_random_draws_belong_to_the_sample_and_the_epoch(dataset, cache):
    def draw(raw: RawSample, rng: np.random.Generator) -> dict[str, float]:
        return {"draw": float(rng.random())}

    def drawn(batch_size: int) -> dict[tuple[int, str], float]:
        stream = Stream(str(dataset), batch_size, draw, cache=cache)
        return {
            (epoch, key): value
            for epoch in range(2)
            for batch in stream
            for key, value in zip(batch["key"], batch["draw"].tolist(), strict=True)
        }

    one, five = drawn(1), drawn(5)
    assert five.items() <= one.items()
    assert len(set(one.values())) == 2 * sum(SIZES)


def test_a_state_of_another_order_is_refused(dataset, other, cache):
    state = Stream(str(dataset), 4, cache=cache).state_dict()
    for stream in (
        Stream(str(other), 4, cache=cache),
        Stream(str(dataset), 4, seed=1, cache=cache),
        Stream(str(dataset), 4, window=2, cache=cache),
        Stream([Source(str(dataset), keep=Filter(min_score=0.85))], 4, cache=cache),
    ):
        with pytest.raises(RunError, match="another"):
            stream.load_state_dict(state)


def test_ranks_that_do_not_divide_the_batch_are_refused(dataset, cache):
    with pytest.raises(RunError, match="batch_size 4 cannot be shared by 3 ranks"):
        Stream(str(dataset), 4, ranks=3, cache=cache)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_stateful_loader_resumes_it(dataset, cache, workers):
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(Stream(str(dataset), 4, TRANSFORM, cache=cache), None, num_workers=workers)

    undisturbed = [digest(batch) for batch in loader()]
    first = loader()
    seen = [digest(batch) for batch in itertools.islice(first, 5)]
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    seen += [digest(batch) for batch in second]
    assert seen == undisturbed


def test_a_plain_loader_with_persistent_workers_goes_through_epochs_too(dataset, cache):
    expected = through_epochs(StreamLoader(Stream(str(dataset), 5, cache=cache)))
    loader = DataLoader(Stream(str(dataset), 5, cache=cache), None, num_workers=2, persistent_workers=True)
    for _ in range(3):
        for batch in loader:
            assert batch["key"] == next(expected)["key"]


def test_corrupt_samples_are_replaced_and_listed_and_nothing_else_moves(dataset, cache):
    bad = {"0000000003", "0000000020"}

    def refuse(raw: RawSample, rng: np.random.Generator) -> dict[str, float]:
        if raw.key in bad:
            raise CorruptSampleError("refused")
        return {"draw": float(rng.random())}

    def run(workers: int) -> tuple[list[str], list[tuple[int, str, str]]]:
        loader = StreamLoader(Stream(str(dataset), 5, refuse, cache=cache), workers)
        return ids(list(loader)), [(r.position, r.key, r.reason) for r in loader.replaced]

    whole = ids(list(Stream(str(dataset), 5, cache=cache)))
    seen, replaced = run(workers=0)
    assert {key for _, key, _ in replaced} == bad & set(whole)
    for position, (now, before) in enumerate(zip(seen, whole, strict=True)):
        assert (now != before) == (position in {place for place, _, _ in replaced})
    assert run(workers=2) == (seen, replaced)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask": RLE((10, 12), "")}, "fish: mask of 12 x 10 pixels on an image of"),
        ({"mask": RLE(IMAGE_OF_ROW_1, "")}, "its mask's run lengths do not fill its size"),
        ({"mask": RLE(IMAGE_OF_ROW_1, "no encoding")}, "its mask's run lengths do not fill its size"),
        ({"mask": RLE(IMAGE_OF_ROW_1, "5")}, "its mask's run lengths do not fill its size"),
        ({"mask": RLE(IMAGE_OF_ROW_1, "oooooo0")}, "its mask's run lengths do not fill its size"),
        ({"mask": RLE((0, 0), "")}, "fish: mask of 0 x 0 pixels"),
        ({"box": (4.0, math.nan, 20.0, 24.0)}, "entity 0, 'fish': its box is (4.0, nan, 20.0, 24.0)"),
        ({"box": (4.0, 4.0, math.inf, 24.0)}, "entity 0, 'fish': its box is (4.0, 4.0, inf, 24.0)"),
    ],
)
def test_a_corrupt_annotation_is_replaced_and_named(tmp_path, change, reason):
    rows = [sample(row) for row in range(6)]
    rows[1] = rows[1].replace(candidates=(dataclasses.replace(rows[1].candidates[0], **change),))
    write_shard(Store(str(tmp_path / "dataset")), "shard", Slice(0, tuple(rows)), PROVENANCE)
    loader = StreamLoader(Stream(str(tmp_path / "dataset"), 6, TRANSFORM, cache=tmp_path / "cache"))
    (batch,) = loader
    assert {replaced.key for replaced in loader.replaced} == {"0000000001"}
    assert reason in loader.replaced[0].reason
    assert "0000000001" not in batch["key"]


def test_whatever_a_transform_stumbles_over_is_the_samples_fault(dataset, cache):
    def stumble(raw: RawSample, rng: np.random.Generator) -> dict[str, float]:
        if raw.key == "0000000003":
            raise ZeroDivisionError("division\nby zero")
        return {"draw": float(rng.random())}

    loader = StreamLoader(Stream(str(dataset), 5, stumble, cache=cache), 1)
    for _ in range(2):  # an epoch may leave the sample out
        list(loader)
    assert {(r.key, r.reason) for r in loader.replaced} == {("0000000003", "ZeroDivisionError: division by zero")}


def test_a_dataset_of_nothing_but_corrupt_samples_ends_with_one_line(dataset, cache):
    def refuse(raw: RawSample, rng: np.random.Generator) -> dict[str, float]:
        raise CorruptSampleError("refused")

    for workers in (0, 1):
        with pytest.raises(ShardError, match="drawn in a row are corrupt") as error:
            next(iter(StreamLoader(Stream(str(dataset), 5, refuse, cache=cache), workers)))
        assert "\n" not in str(error.value)


def test_a_shard_that_fails_its_hash_is_refused_by_name(tmp_path, cache):
    folder = write_dataset(tmp_path / "dataset", (4, 4))
    tar = folder / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-000001\.tar: its SHA-256"):
        list(Stream(str(folder), 2, cache=cache))
    tar.write_bytes(data[:-512])
    with pytest.raises(ShardError, match=r"shard-000001\.tar: \d+ bytes instead of"):
        list(Stream(str(folder), 2, cache=cache))


def test_the_transform_cuts_images_boxes_and_masks_alike(dataset, cache):
    stream = Stream(str(dataset), 6, SubjectTransform(size_px=24, max_subjects=3), cache=cache)
    shown = 0
    for batch in stream:
        for row in range(6):
            truth = {e.tag for e in sample(int(batch["key"][row]), entities=3).entities}
            for tag, box, mask, present in zip(
                batch["tags"][row], batch["boxes"][row], batch["masks"][row], batch["present"][row], strict=True
            ):
                assert bool(tag) == bool(present) == bool(mask.any())
                if present:
                    assert tag in truth
                    shown += 1
                    x1, y1, x2, y2 = np.round(box.numpy() * 24).astype(int)
                    inside = mask[y1:y2, x1:x2].float().mean()
                    assert inside > 0.8
                    assert mask.sum() <= (x2 - x1 + 2) * (y2 - y1 + 2)
    assert shown > 50


def test_memory_stays_flat_over_epochs(dataset, cache):
    loader = StreamLoader(Stream(str(dataset), 5, TRANSFORM, window=2, cache=cache), workers=2)
    others = psutil.Process().children()

    def epochs(count: int) -> tuple[int, int]:
        for _ in range(count):
            for _ in loader:
                pass
        workers = [p for p in psutil.Process().children() if p not in others]
        assert len(workers) == 2
        # Not what is theirs alone (USS): that grows as their parent rewrites pages that it shared with them.
        return sum(p.memory_info().rss for p in workers), sum(p.num_fds() for p in workers)

    memory, files = np.diff([epochs(20) for _ in range(5)], axis=0).T
    # A leak grows every time; an allocator's arena or a read-ahead now and then.
    assert min(memory) < 1 << 20
    assert min(files) < 20


def test_batches_that_are_kept_stay_as_they_were(dataset, cache):
    stream = Stream(str(dataset), 5, TRANSFORM, cache=cache)
    expected = [digest(batch) for batch in stream]
    kept = list(StreamLoader(Stream(str(dataset), 5, TRANSFORM, cache=cache), workers=2, prefetch=1))
    assert [digest(batch) for batch in kept] == expected
    loader = StreamLoader(Stream(str(dataset), 5, cache=cache), workers=2, prefetch=1)
    contents = [batch["members"][4]["jpg"] for batch in loader]
    keys = [batch["key"][4] for batch in Stream(str(dataset), 5, cache=cache)]
    assert [bytes(c) for c in contents] == [sample(int(key)).image for key in keys]


def test_processes_leave_nothing_open(dataset, cache):
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        list(Stream(str(dataset), 5, cache=cache))
    assert len(os.listdir("/dev/fd")) <= before
