"""Where a dataset knows the same subject in two images, each is the other's reference."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datapipe.schema import IDENTITIES, Entity, Slice
from datapipe.shards import Store, write_shard
from subject_diffusion.errors import RunError
from tests.conftest import jpeg, rle
from tests.train.datasets import PROVENANCE, sample
from tests.train.training import training_recipe
from train.evaluation.cases import find_cases
from train.stream.cache import ShardCache
from train.stream.dataset import Stream
from train.stream.filter import Filter
from train.stream.source import Source
from train.trainer.examples import TrainingExamples
from train.trainer.identities import Pairs
from train.trainer.launch import train
from train.trainer.recipe import ExampleSettings, ReferenceSettings

STILL = ReferenceSettings(scale=(1, 1), flip=0, rotation_degrees=0, perspective=0)
BOXES = ((0, 0, 20, 20), (20, 20, 40, 40))  # squares, so that nothing is left to chance in a still reference


def write(folder: Path, identities: Any = None) -> Path:
    """Four samples in two shards, each with a mug and a fish."""
    store = Store(str(folder))
    for shard in range(2):
        rows = [2 * shard, 2 * shard + 1]
        write_shard(store, "shard", Slice(shard, tuple(_sample(row) for row in rows)), PROVENANCE)
    if identities is not None:
        store.put(IDENTITIES, parquet(identities))
    return folder


def _sample(row: int) -> Any:
    entities = [
        Entity(tag, (2, 5), (float(box[0]), float(box[1]), float(box[2]), float(box[3])), 0.9, 0.8, rle(40, 40, box))
        for tag, box in zip(("mug", "fish"), BOXES, strict=True)
    ]
    plain = dataclasses.replace(sample(row), image=jpeg(40, 40, row), width=40, height=40, caption="a mug, a fish")
    return plain.replace(candidates=tuple(entities))


def parquet(columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())


def table(*rows: tuple[int, int, str]) -> dict[str, list[Any]]:
    return {
        "key": [f"{row:010d}" for row, _, _ in rows],
        "entity": [entity for _, entity, _ in rows],
        "identity": [identity for _, _, identity in rows],
    }


def references(folder: Path, cache: Path, settings: ReferenceSettings = STILL, keep: Filter | None = None) -> Any:
    """(key, number of the subject) -> its reference."""
    sources = [Source(str(folder), keep=keep or Filter())]
    pairs = Pairs(sources, ShardCache(cache, 1 << 30))
    examples = TrainingExamples(ExampleSettings(size_px=40, reference=settings), 2, 24, 4, 8, pairs)
    (batch,) = Stream(sources, 4, examples, cache=cache)
    return {
        (key, int(number)): batch["references"][row, slot].numpy()
        for row, key in enumerate(batch["key"])
        for slot, number in enumerate(batch["entities"][row])
        if number >= 0
    }


def test_an_evaluation_takes_a_reference_from_another_image_and_knows_who_is_the_same(tmp_path):
    paired = write(tmp_path / "paired", table((0, 0, "my mug"), (3, 0, "my mug"), (1, 1, "a fish of one image")))
    plain = find_cases(str(write(tmp_path / "alone")), 9, ExampleSettings(size_px=40), (1, 2), tmp_path / "cache")
    cases = find_cases(str(paired), 9, ExampleSettings(size_px=40), (1, 2), tmp_path / "cache")
    own, reference = ([np.asarray(s.picture) for s in case.subjects] for case in (plain[3], cases[0]))
    assert (reference[0] == own[0]).all() and (reference[1] != own[1]).any()
    assert reference[0].shape == (22, 22, 3)  # of 20 pixels, and a rim
    assert cases[0].individuals[0] == cases[3].individuals[0]
    assert len({name for case in cases for name in case.individuals}) == 7


def key(row: int) -> str:
    return f"{row:010d}"


def test_a_subject_of_two_images_has_each_cut_from_the_other_across_shards(tmp_path):
    alone = references(write(tmp_path / "alone"), tmp_path / "cache")
    paired = write(tmp_path / "paired", table((0, 0, "my mug"), (3, 0, "my mug"), (1, 1, "a fish of one image")))
    found = references(paired, tmp_path / "cache")
    assert (found[key(0), 0] == alone[key(3), 0]).all()
    assert (found[key(3), 0] == alone[key(0), 0]).all()
    for name in alone.keys() - {(key(0), 0), (key(3), 0)}:
        assert (found[name] == alone[name]).all(), name


def test_never_is_never(tmp_path):
    paired = write(tmp_path / "paired", table((0, 0, "mug"), (3, 0, "mug")))
    alone = references(write(tmp_path / "alone"), tmp_path / "cache")
    found = references(paired, tmp_path / "cache", STILL.model_copy(update={"cross_image": 0.0}))
    assert all((found[name] == alone[name]).all() for name in alone)


def test_an_entitys_number_is_the_samples_whatever_the_filter(tmp_path):
    alone = references(write(tmp_path / "alone"), tmp_path / "cache")
    paired = write(tmp_path / "paired", table((0, 1, "fish"), (3, 1, "fish")))
    found = references(paired, tmp_path / "cache", keep=Filter(tags=frozenset({"fish"})))
    assert (found[key(0), 0] == alone[key(3), 1]).all()  # of the entities that are wanted it is the first


def test_one_of_several_is_drawn_and_never_the_image_itself(tmp_path):
    folder = write(tmp_path / "paired", table(*((row, 0, "mug") for row in range(4)), (0, 1, "mug")))
    sources = [Source(str(folder))]
    pairs = Pairs(sources, ShardCache(tmp_path / "cache", 1 << 30))
    examples = TrainingExamples(ExampleSettings(size_px=40, reference=STILL), 2, 24, 4, 8, pairs)
    alone = {name: r.tobytes() for name, r in references(write(tmp_path / "alone"), tmp_path / "cache").items()}
    seen = set()
    for seed in range(12):
        for batch in Stream(sources, 4, examples, seed=seed, cache=tmp_path / "cache"):
            row = batch["key"].index(key(0))
            shown = batch["references"][row, 0].numpy().tobytes()
            seen |= {name for name in alone if alone[name] == shown}
    assert seen == {(key(row), 0) for row in (1, 2, 3)}


def test_a_fingerprint_tells_other_pairs_and_is_cheap_for_identities_of_many_images(tmp_path):
    def fingerprint(*groups: range) -> str:
        pairs = Pairs([], ShardCache(tmp_path / "cache", 1 << 30))
        for group in groups:
            names = [("dataset", key(row), 0) for row in group]
            pairs._alike |= dict.fromkeys(names, names)
        return pairs.fingerprint("dataset")

    assert fingerprint(range(4)) == fingerprint(range(4))
    others = [fingerprint(range(4)), fingerprint(range(5)), fingerprint(range(2), range(2, 4)), fingerprint()]
    assert len(set(others)) == 4
    started = time.process_time()
    fingerprint(range(8000))  # 64 million pairs: half a minute and 3 GB where each was written out
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("identities", "message"),
    [
        ({"key": ["0"], "entity": [0]}, "no column 'identity'"),
        ({"key": ["0"], "entity": ["first"], "identity": ["mug"]}, "entity an integer"),
        ({"key": ["0"], "entity": [0], "identity": pa.array([None], pa.string())}, "a cell is empty"),
        (table((0, 0, "mug"), (7, 0, "mug")), f"sample {7:010d} is not in this dataset"),
    ],
)
def test_a_faulty_table_is_named_before_any_training(tmp_path, sd1, clip, identities, message):
    folder = write(tmp_path / "paired", identities)
    with pytest.raises(RunError, match=re.escape(IDENTITIES) + ".*" + message):
        train(training_recipe(sd1, clip, folder), tmp_path / "run")


def test_a_file_that_is_no_table_is_named(tmp_path):
    folder = write(tmp_path / "paired")
    (folder / IDENTITIES).write_bytes(b"nonsense")
    with pytest.raises(RunError, match="no parquet file"):
        Pairs([Source(str(folder))], ShardCache(tmp_path / "cache", 1 << 30))
