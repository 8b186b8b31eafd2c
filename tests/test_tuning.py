"""Where settings are auto, a run finds how many images a model takes at once, and whether to compile it. What stands in
for the GPU here is a model whose time and memory are known."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from datapipe.plan import AUTO_FILE, Plan, read_found, record_found
from datapipe.probe import MANY_BOXES, probe_sample, tune
from datapipe.recipe import Pool, RunSettings, build_stage, load_recipe
from datapipe.run import _found_before
from datapipe.schema import Sample, StageName
from datapipe.shards import Provenance, Store
from datapipe.stages.segment import SegmentSettings
from datapipe.stages.stage import Compilable, Overlapping
from datapipe.tuning import MOST, find_batch, frees_memory
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

    def found(self, rows: int = 0, **settings: object) -> tuple[dict[str, int], str]:
        block = SegmentSettings.model_validate(settings)
        return tune(self, block, at_once=3, most=64, rows=rows, clock=lambda: self.now)


class OverlappingModel(Model, Overlapping):
    """The same, for several batches at once."""


class CompilableModel(Model, Compilable):
    """Compiled, it takes a hundred seconds once, and then half a second for a batch; or it cannot be compiled."""

    compiled = False
    breaks = False

    def compile(self) -> None:
        self.compiled = True

    def pass_time(self) -> None:
        if self.compiled and self.breaks:
            raise RuntimeError("no C compiler\n  was found")
        self.now += 0.5 if self.compiled else 1
        if self.compiled and self.first:
            self.now += 100
            self.first = False

    first = True


def test_a_stage_is_tried_as_an_actor_runs_it():
    assert Model(memory=5).found() == ({"micro_batch": 4}, "")
    assert OverlappingModel(memory=5, parties=3).found() == ({"micro_batch": 4}, "")
    with pytest.raises(BackendError, match="segment: its model cannot answer on a test image of 1600 x 800 "):
        Model(memory=0).found()


@pytest.mark.parametrize(("rows", "compile"), [(0, False), (800, False), (810, True), (10**9, True)])
def test_a_model_is_compiled_where_that_ends_the_run_earlier(rows, compile):
    # A second less for 8 images, and 100.5 seconds until the first of them.
    found, remark = CompilableModel(memory=4).found(rows)
    assert found == {"micro_batch": 4, "compile": compile}
    assert not remark


def test_what_is_no_longer_auto_is_left_as_it_is():
    assert CompilableModel(memory=4).found(10**9, micro_batch=2) == ({"compile": True}, "")
    assert CompilableModel(memory=4).found(10**9, compile=False) == ({"micro_batch": 4}, "")
    assert CompilableModel(memory=4).found(10**9, micro_batch=2, compile=True) == ({}, "")


def test_a_model_that_cannot_be_compiled_runs_as_it_is_and_that_is_said():
    model = CompilableModel(memory=4)
    model.breaks = True
    found, remark = model.found(10**9)
    assert found == {"micro_batch": 4, "compile": False}
    assert remark.startswith("segment: runs without torch.compile: ") and remark.count("\n") == 0


def test_a_compiled_segmenter_gives_the_masks_of_one_that_is_not(monkeypatch):
    # The same but for the last step, machine code, which takes minutes on a CPU.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    sample = probe_sample(boxes=2)
    settings = [load_recipe(TOY_RECIPE, [f"segment.compile={compile}"]) for compile in ("auto", "true")]
    plain, compiled = (build_stage(StageName.SEGMENT, recipe)([sample])[0].candidates for recipe in settings)
    assert counters["stats"]["unique_graphs"] >= 1
    for one, other in zip(plain, compiled, strict=True):
        assert one.predicted_iou == pytest.approx(other.predicted_iou, abs=1e-3)
        assert one.mask and other.mask and (one.mask.array() != other.mask.array()).mean() < 1e-3


AUTO = load_recipe(TOY_RECIPE, ["toyworld=null", "caption.micro_batch=auto", "segment.micro_batch=auto"])
FOUND = {
    StageName.CAPTION: {"micro_batch": 64},
    StageName.GROUND: {"micro_batch": 32},
    StageName.SEGMENT: {"micro_batch": 4, "compile": True},
}


def test_what_was_found_takes_the_place_of_auto_alone_and_is_no_part_of_what_a_run_is(tmp_path):
    plan = Plan(AUTO, (), {}, "", Provenance(AUTO.hash(), "", "", {}))
    found = plan.with_found(FOUND).recipe
    batches = [block.images_at_once for block in (found.caption, found.ground, found.segment)]
    assert batches == [64, AUTO.ground.micro_batch, 4]
    assert found.segment.compile is True
    assert found.hash() == AUTO.hash()


def test_a_resumed_run_takes_what_was_recorded_for_stages_that_have_a_gpu_again(tmp_path):
    store = Store(str(tmp_path))
    record_found(store, {})
    assert not store.exists(AUTO_FILE) and read_found(store) == {}
    record_found(store, {StageName.CAPTION: {"micro_batch": 64}})
    record_found(store, FOUND)
    assert read_found(store) == FOUND
    mixed = RunSettings(
        pools=(
            Pool(stages=(StageName.CAPTION, StageName.TAG), gpus=1),
            Pool(stages=(StageName.GROUND, StageName.SEGMENT, StageName.SELECT)),
        )
    )
    assert _found_before(store, mixed) == {StageName.CAPTION: {"micro_batch": 64}}


@pytest.mark.parametrize(
    "written",
    [
        "",
        "[]",
        '{"caption": 8}',
        '{"caption": {"micro_batch": "8"}}',
        '{"caption": {"size": 1}}',
        '{"kaption": {}}',
    ],
)
def test_a_record_that_cannot_be_read_is_one_line(tmp_path: Path, written: str):
    (tmp_path / AUTO_FILE).write_text(written)
    with pytest.raises(RunError, match=r"auto\.json: not what a run records; remove it"):
        read_found(Store(str(tmp_path)))
