"""What the trainer learns from: references that show their subject alone, and draws that are the sample's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from subject_diffusion.errors import RunError
from tests.train.datasets import sample, write_dataset
from train.stream.dataset import Stream
from train.stream.source import Source
from train.trainer.examples import TrainingExamples
from train.trainer.recipe import ExampleSettings, ReferenceSettings
from train.trainer.references import draw_reference

STILL = ReferenceSettings(scale=(1, 1), flip=0, rotation_degrees=0, perspective=0)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("dataset"), (6, 6))
    cache = tmp_path_factory.mktemp("cache")

    def make(settings: ExampleSettings, batch_size: int = 4) -> Stream:
        return Stream([Source(str(folder))], batch_size, TrainingExamples(settings, 2, 24, 4, 8), cache=cache)

    return make


def test_a_still_reference_is_the_subject_alone_on_white():
    image = np.full((40, 60, 3), (10, 200, 30), np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    reference = draw_reference(STILL, image, mask, 30, np.random.default_rng(0)).transpose(1, 2, 0)
    inside = (reference == (10, 200, 30)).all(axis=2)
    assert inside.sum() == 30 * 20
    assert (reference[~inside] == 255).all()


def test_augmentation_moves_the_subject_and_keeps_its_colors():
    image = np.full((40, 40, 3), (10, 200, 30), np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[5:35, 5:20] = True
    rng = np.random.default_rng(0)
    several = [draw_reference(ReferenceSettings(), image, mask, 32, rng) for _ in range(8)]
    assert len({reference.tobytes() for reference in several}) == 8
    for reference in several:
        assert (reference == np.array([10, 200, 30])[:, None, None]).all(axis=0).sum() > 60
        assert (reference == 255).all(axis=0).any()


def test_a_photo_is_drawn_behind_the_subject(tmp_path):
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "sky.png")
    settings = STILL.model_copy(update={"background": "photo", "photos": str(tmp_path)})
    mask = np.zeros((20, 20), bool)
    mask[5:15, 8:12] = True
    reference = draw_reference(settings, np.zeros((20, 20, 3), np.uint8), mask, 20, np.random.default_rng(0))
    assert reference[2].max() == 255
    assert reference[0].max() == 0


def test_a_folder_without_pictures_is_named(tmp_path):
    settings = ExampleSettings(reference=ReferenceSettings(background="photo", photos=str(tmp_path)))
    with pytest.raises(RunError, match="no pictures in"):
        TrainingExamples(settings, 2, 24, 4, 8)


def test_every_draw_is_the_samples_own(stream):
    settings = ExampleSettings(size_px=32)
    one_by_one = {k: b for b in stream(settings, 1) for k in b["key"]}
    for batch in stream(settings, 4):
        for row, key in enumerate(batch["key"]):
            alone = one_by_one[key]
            for name in ("noise", "offset", "timestep_draw", "condition_draw", "references", "image"):
                assert (batch[name][row] == alone[name][0]).all(), name


def test_absent_subjects_have_no_reference_and_present_ones_do(stream):
    for batch in stream(ExampleSettings(size_px=32)):
        shown = batch["references"].flatten(2).any(dim=2)
        assert (shown == batch["present"]).all()
        assert (batch["masks"].flatten(2).any(dim=2) == batch["present"]).all()


def test_subjects_are_dropped_as_often_as_the_recipe_asks(stream):
    all_shown, fewer = (
        torch.cat([batch["present"].sum(1) for batch in stream(ExampleSettings(size_px=32, drop_subjects=share))])
        for share in (0.0, 1.0)
    )
    assert (fewer[all_shown > 1] < all_shown[all_shown > 1]).all() and (all_shown > 1).any()
    assert (fewer[all_shown == 1] == 1).all()


def test_a_subject_without_a_mask_is_cut_by_its_box(monkeypatch):
    import dataclasses

    from train.stream.tar_sample import RawSample

    plain = sample(0)
    plain = plain.replace(candidates=tuple(dataclasses.replace(e, mask=None) for e in plain.candidates))
    monkeypatch.setattr(RawSample, "annotation", lambda self: plain)
    raw = RawSample("0", {"jpg": memoryview(plain.image or b"")})
    found = TrainingExamples(ExampleSettings(size_px=32), 2, 24, 4, 8)(raw, np.random.default_rng(0))
    x1, y1, x2, y2 = found["boxes"][0] * 32
    assert found["masks"][0].sum() == pytest.approx((x2 - x1) * (y2 - y1), rel=0.2)
