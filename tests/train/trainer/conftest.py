"""One short run, undisturbed, that many tests look into or go on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.datasets import write_dataset
from tests.train.training import training_recipe
from train.trainer.launch import train
from train.trainer.recipe import TrainRecipe


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"), (6, 5, 7))


@pytest.fixture(scope="session")
def recipe(sd1, clip, dataset) -> TrainRecipe:
    return training_recipe(sd1, clip, dataset)


@pytest.fixture(scope="session")
def undisturbed(recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(recipe, out)
    return out
