"""One dataset of several shards for the tests that stream from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.datasets import write_dataset

SIZES = (7, 12, 5, 9, 11, 3, 8, 10)
"""Samples of each shard."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"), SIZES)
