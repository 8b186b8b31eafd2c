"""Where `micro_batch` is auto, a run finds how many images a model takes at once. What stands in for the GPU here is a
model whose time and memory are known."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from datapipe.batch_size import MOST, find_batch, frees_memory
from datapipe.plan import MICRO_BATCH_FILE, Plan, read_micro_batches, record_micro_batches
from datapipe.probe import MANY_BOXES, best_batch
from datapipe.recipe import Pool, RunSettings, load_recipe
from datapipe.run import _found_before
from datapipe.schema import Sample, StageName
from datapipe.shards import Provenance, Store
from datapipe.stages.stage import Overlapping
from subject_diffusion.errors import BackendError, RunError
from tests.toy import TOY_RECIPE


@dataclass
class Gpu:
    """Takes `call_s` for a batch and `image_s` for each of its images, and holds `memory` of them. Its first call with
    a batch takes ten times as long."""

    call_s: float
    image_s: float
    memory: int = 1_000_000
    now: float = 0.0
    tried: list[int] = field(default_factory=list)

    def __call__(self, batch: int) -> None:
        if batch > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        took = self.call_s + batch * self.image_s
        self.now += took if batch in self.tried else 10 * took
        self.tried.append(batch)

    def find(self, most: int = MOST) -> int:
        return find_batch(self, most, clock=lambda: self.now).batch


@pytest.mark.parametrize(
    ("gpu", "most", "batch"),
    [
        (Gpu(call_s=0, image_s=1), MOST, 1),  # nothing is gained
        (Gpu(call_s=1, image_s=1), MOST, 16),  # 32 images at once would label 3 % more
        (Gpu(call_s=1, image_s=0.001), MOST, MOST),
        (Gpu(call_s=1, image_s=0.001), 100, 64),
        (Gpu(call_s=1, image_s=0.001), 0, 1),
        (Gpu(call_s=1, image_s=0.001, memory=33), MOST, 32),
        (Gpu(call_s=1, image_s=0.001, memory=1), MOST, 1),
    ],
)
def test_the_batch_doubles_until_memory_or_the_gain_runs_out(gpu, most, batch):
    assert gpu.find(most) == batch
    assert max(gpu.tried) <= 2 * batch, "no more is tried than one batch that is not worth it"


def test_no_room_for_one_image_and_every_other_error_are_the_callers():
    with pytest.raises(torch.OutOfMemoryError):
        Gpu(1, 1, memory=0).find()

    def broken(batch: int) -> None:
        if batch > 2:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        find_batch(broken)


def test_what_did_not_fit_is_forgotten_before_less_is_tried():
    held: list[weakref.ref[torch.Tensor]] = []

    def network() -> None:
        activations = torch.zeros(1)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as raised:
        network()
    assert held[0]() is not None
    assert frees_memory(raised.value)
    assert held[0]() is None
    assert not frees_memory(ValueError("another"))


class Model:
    """Takes a second for `parties` batches that are under way together, and holds `memory` images of each."""

    name = StageName.SEGMENT
    micro_batch = 8

    def __init__(self, memory: int, parties: int = 1) -> None:
        self.memory, self.met, self.now = memory, threading.Barrier(parties, self.pass_time), 0.0

    def pass_time(self) -> None:
        self.now += 1

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        assert all(len(s.candidates) == MANY_BOXES for s in samples)
        self.met.wait(60)
        if len(samples) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(samples)

    def best(self) -> int:
        return best_batch(self, at_once=3, most=64, clock=lambda: self.now)


class OverlappingModel(Model, Overlapping):
    """The same, for several batches at once."""


def test_a_stage_is_tried_as_an_actor_runs_it():
    assert Model(memory=5).best() == 4
    assert OverlappingModel(memory=5, parties=3).best() == 4
    with pytest.raises(BackendError, match="segment: its model cannot answer on a test image of 1600 x 800 "):
        Model(memory=0).best()


AUTO = load_recipe(TOY_RECIPE, ["toyworld=null", "caption.micro_batch=auto", "segment.micro_batch=auto"])
FOUND = {StageName.CAPTION: 64, StageName.GROUND: 32, StageName.SEGMENT: 4}


def test_what_was_found_takes_the_place_of_auto_alone_and_is_no_part_of_what_a_run_is(tmp_path):
    plan = Plan(AUTO, (), {}, "", Provenance(AUTO.hash(), "", "", {}))
    found = plan.with_micro_batches(FOUND).recipe
    batches = [block.images_at_once for block in (found.caption, found.ground, found.segment)]
    assert batches == [64, AUTO.ground.micro_batch, 4]
    assert found.hash() == AUTO.hash()


def test_a_resumed_run_takes_what_was_recorded_for_stages_that_have_a_gpu_again(tmp_path):
    store = Store(str(tmp_path))
    record_micro_batches(store, {})
    assert not store.exists(MICRO_BATCH_FILE) and read_micro_batches(store) == {}
    record_micro_batches(store, {StageName.CAPTION: 64})
    record_micro_batches(store, FOUND)
    assert read_micro_batches(store) == FOUND
    mixed = RunSettings(
        pools=(
            Pool(stages=(StageName.CAPTION, StageName.TAG), gpus=1),
            Pool(stages=(StageName.GROUND, StageName.SEGMENT, StageName.SELECT)),
        )
    )
    assert _found_before(store, mixed) == {StageName.CAPTION: 64}


@pytest.mark.parametrize("written", ["", "[]", '{"caption": "many"}', '{"caption": null}', '{"kaption": 1}'])
def test_a_record_that_cannot_be_read_is_one_line(tmp_path: Path, written: str):
    (tmp_path / MICRO_BATCH_FILE).write_text(written)
    with pytest.raises(RunError, match=r"micro_batch\.json: not what a run records; remove it"):
        read_micro_batches(Store(str(tmp_path)))
