"""A worker holds so many bytes of a slice's images and no more, and nobody who reads the shard can tell."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from datapipe.isolation import BATCH_BYTES, _micro_batches
from datapipe.ledger import Ledger
from datapipe.schema import Sample, Slice, StageName
from datapipe.shards import Store, read_manifest, read_slice, write_shard
from datapipe.sources import SourceSettings, open_source, row_images
from datapipe.spill import Spill, Spilled, loaded
from datapipe.stages.fetch import FetchSettings
from datapipe.stages.stage import Stage
from datapipe.workers import _with_images, _without_images, run_stages
from subject_diffusion.errors import RunError

ROWS, SIZE = 60, 200_000
HELD = 5 * SIZE


def image(row: int) -> bytes:
    return np.random.default_rng(row).bytes(SIZE)


class Halves:
    """Cuts every third image to its half, and takes away every second one of the rest."""

    name = StageName.SCREEN
    micro_batch = 4

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Sample:
        assert sample.image == image(sample.row)
        if sample.row % 3 == 0:
            return sample.replace(image=sample.image[: SIZE // 2])
        return sample.replace(image=None) if sample.row % 2 else sample


def left_of(row: int) -> bytes | None:
    if row % 3 == 0:
        return image(row)[: SIZE // 2]
    return None if row % 2 else image(row)


def test_a_slice_far_beyond_the_bound_is_made_and_read_within_it(tmp_path, provenance, monkeypatch):
    monkeypatch.setattr(row_images, "BYTES_AT_ONCE", HELD)
    (tmp_path / "images").mkdir()
    for row in range(ROWS):
        (tmp_path / "images" / f"{row:03d}.jpg").write_bytes(image(row))
    source = open_source(SourceSettings(path=str(tmp_path / "images")), str(tmp_path / "scratch"))
    store = Store(str(tmp_path / "set"))
    stages: list[Stage] = [FetchSettings(micro_batch=4).build(), Halves()]

    def make() -> None:
        spill = Spill(HELD)
        work = Slice(0, tuple(source.read(0, ROWS, 0, spill.hold)))
        write_shard(store, "raw", run_stages(stages, work, Ledger(), 60, spill=spill), provenance)

    def hand_on() -> None:
        raw = read_slice(store, read_manifest(store, "raw", 0), Spill(HELD))
        handed = _without_images(raw, raw)
        assert not any(sample.image for sample in handed.samples)
        assert [loaded(sample).image for sample in _with_images(handed, raw).samples[:4]] == [*map(left_of, range(4))]

    assert peak(make) < 4 * HELD, "what is held, and what is read at once"
    assert peak(hand_on) < 2 * HELD
    samples = read_slice(store, read_manifest(store, "raw", 0)).samples
    assert [sample.image for sample in samples] == [*map(left_of, range(ROWS))]


def peak(work: Callable[[], object]) -> int:
    """The most bytes that were held at once while a function ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_downloads_are_held_as_they_come(tmp_path):
    spill = Spill(HELD)
    spilled = [spill.hold(image(row)) for row in range(8)]
    assert [isinstance(one, Spilled) for one in spilled] == [False] * 5 + [True] * 3
    assert [len(one) for one in spilled] == [SIZE] * 8
    assert loaded(Sample(row=7, image=spilled[7])).image == image(7)
    assert spill.hold(spilled[0]) is spilled[0] and spill.hold(spilled[7]) is spilled[7]
    spill.release(spilled[0])
    assert not isinstance(spill.hold(image(0)), Spilled), "there is room again"


def test_a_micro_batch_is_cut_where_its_images_are_too_large():
    """Ten photographs of 48 megapixels, 144 MB each, then smaller ones."""
    stage = Halves()
    stage.micro_batch = 8
    sizes = [(8000, 6000)] * 10 + [(1024, 768)] * 10 + [(20_000, 10_000)] * 2
    samples = [Sample(row=i, width=w, height=h) for i, (w, h) in enumerate(sizes)]
    batches = list(_micro_batches(stage, samples))
    assert [len(batch) for batch in batches] == [3, 3, 3, 8, 3, 1, 1]
    assert [s for batch in batches for s in batch] == samples
    assert all(len(b) == 1 or sum(3 * s.width * s.height for s in b) <= BATCH_BYTES for b in batches)


def test_no_room_for_what_is_too_much_is_one_line(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(RunError, match=r"no room for temporary files .* set TMPDIR"):
        Spill(0).hold(b"image")
