"""A subject's features are of its mask alone, whatever is around it and whoever shares the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from datapipe.backends.loading import ModelSettings
from datapipe.backends.patch_features import PatchFeatures, cut_out, subject_features
from tests.train.benchmark.folders import write_dinov2, write_siglip2

GRID = 3


@pytest.fixture(scope="module", params=["dinov2", "siglip2"])
def features(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PatchFeatures:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write = {"dinov2": write_dinov2, "siglip2": write_siglip2}[request.param]
    return PatchFeatures(ModelSettings(model=str(write(folder))), GRID)


def subject(seed: int, height: int = 60, width: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    mask[10 : height - 15, 8 : width - 4] = True
    mask[12:20, 10:20] = False
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), mask


def test_features_are_of_the_mask_alone(features):
    pixels, mask = subject(0)
    around = np.where(mask[..., None], pixels, np.uint8(7))
    moved = np.zeros((90, 70, 3), np.uint8), np.zeros((90, 70), bool)
    moved[0][20:80, 25:65], moved[1][20:80, 25:65] = pixels, mask
    expected, *others = features([(pixels, mask), (around, mask), moved])
    for other in others:
        assert np.allclose(other.embedding, expected.embedding, atol=1e-5)
        assert np.allclose(other.patches, expected.patches, atol=1e-5) and (other.cells == expected.cells).all()
    assert np.isclose(np.linalg.norm(expected.embedding), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(expected.patches, axis=1), 1, atol=1e-5)


def test_one_by_one_is_as_together(features):
    subjects = [subject(seed, 60 + 10 * seed, 40) for seed in range(3)]
    for together, alone in zip(features(subjects), (features([s])[0] for s in subjects), strict=True):
        assert np.allclose(together.embedding, alone.embedding, atol=1e-5)
        assert np.allclose(together.patches, alone.patches, atol=1e-5)


def test_a_cut_out_fills_its_square_and_shows_nothing_else():
    pixels, mask = subject(1)
    picture, covered = cut_out(pixels, mask, 35, [10, 20, 30])
    assert picture.shape == (35, 35, 3) and covered.shape == (35, 35)
    assert (covered[[0, -1]].max(axis=1) == 1).all(), "the longer side reaches both borders"
    assert (picture[covered == 0] == [10, 20, 30]).all()


def test_means_over_cells_are_those_of_a_slow_loop():
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.standard_normal((2, 6, 6, 5)).astype(np.float32))
    covered = torch.from_numpy((rng.random((2, 12, 12)) < 0.6).astype(np.float32))
    for one, found in enumerate(subject_features(tokens, covered, GRID)):
        weight = covered[one].reshape(6, 2, 6, 2).mean(dim=(1, 3))
        whole = (tokens[one] * weight[..., None]).sum(dim=(0, 1))
        assert np.allclose(found.embedding, whole / whole.norm(), atol=1e-5)
        for cell, mean in zip(found.cells.tolist(), found.patches, strict=True):
            rows, columns = (slice(2 * at, 2 * at + 2) for at in divmod(cell, GRID))
            assert weight[rows, columns].mean() >= 0.5
            slow = (tokens[one, rows, columns] * weight[rows, columns, None]).sum(dim=(0, 1))
            assert np.allclose(mean, slow / slow.norm(), atol=1e-5)
