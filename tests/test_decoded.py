"""An image that several stages of an actor look at is decoded once, within a bound on memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import cv2
import numpy as np
import pytest

from datapipe import decoded, workers
from datapipe.decoding import decode_rgb
from datapipe.ledger import Ledger
from datapipe.schema import Outcome, Sample, Slice, StageName
from datapipe.spill import Spill
from datapipe.stages.stage import Overlapping, SeesImages

SIDE = 16
SIZE = SIDE * SIDE * 3
"""Bytes of an image's pixels."""


class Looks(Overlapping, SeesImages):
    """Notes what it sees."""

    micro_batch = 2

    def __init__(self, name: StageName) -> None:
        self.name = name
        self.seen: dict[int, float] = {}
        self.pixels: list[weakref.ref[np.ndarray]] = []

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        for sample in samples:
            pixels = self.decode(sample.image or b"")
            self.seen[sample.row] = float(pixels.mean())
            self.pixels.append(weakref.ref(pixels))
        return list(samples)


def picture(row: int) -> bytes:
    return bytes(cv2.imencode(".jpg", np.full((SIDE, SIDE, 3), row * 10, np.uint8))[1])


SAMPLES = tuple(Sample(row=row, image=picture(row)) for row in range(12))


@pytest.fixture
def decodings(monkeypatch) -> list[bytes]:
    """The images that were decoded, in order."""
    found: list[bytes] = []

    def decode(data: bytes) -> np.ndarray:
        found.append(data)
        return decode_rgb(data)

    monkeypatch.setattr(Looks, "decode", staticmethod(decode))
    return found


@pytest.mark.parametrize(("held", "decoded_again"), [(12, 0), (5, 7), (0, 12)])
@pytest.mark.parametrize("at_once", [1, 3])
def test_what_fits_the_bound_is_decoded_once_for_all_stages(decodings, monkeypatch, held, decoded_again, at_once):
    monkeypatch.setattr(workers, "decoded_once", lambda stages: decoded.decoded_once(stages, held * SIZE + SIZE - 1))
    stages = [Looks(StageName.CAPTION), Looks(StageName.GROUND), Looks(StageName.SEGMENT)]
    workers.run_stages(stages, Slice(0, SAMPLES), Ledger(), 60, at_once)
    assert len(decodings) == 12 + 2 * decoded_again
    assert stages[0].seen == stages[1].seen == stages[2].seen
    assert len(set(stages[0].seen.values())) == 12, "each saw its own image"
    gc.collect()
    assert not any(pixels() is not None for stage in stages for pixels in stage.pixels), "nothing outlives the slice"


def test_so_is_one_that_lies_in_the_temporary_file_of_its_slice(decodings):
    spill = Spill(held_bytes=0)
    work = Slice(0, tuple(sample.replace(image=spill.hold(sample.image or b"")) for sample in SAMPLES))
    stages = [Looks(StageName.CAPTION), Looks(StageName.GROUND)]
    workers.run_stages(stages, work, Ledger(), 60, spill=spill)
    assert len(decodings) == 12 and stages[0].seen == stages[1].seen


def test_an_image_that_cannot_be_decoded_fails_alone():
    broken = (*SAMPLES[:3], Sample(row=3, image=b"no image"), *SAMPLES[4:])
    stages = [Looks(StageName.CAPTION), Looks(StageName.GROUND)]
    done = workers.run_stages(stages, Slice(0, broken), Ledger(), 60, 2).samples
    failed = [s.row for s in done if s.verdict and s.verdict.outcome is Outcome.FAILED]
    assert failed == [3] and len(stages[1].seen) == 11
