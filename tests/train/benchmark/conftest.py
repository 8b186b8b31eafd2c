"""What the benchmark's tests read, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.benchmark.folders import write_dinov2, write_dreambench, write_pipeline, write_siglip2, write_vit


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders: dino, dino8, dinov2, siglip2."""
    folder = tmp_path_factory.mktemp("backbones")
    write_vit(folder / "dino")
    write_vit(folder / "dino8", patch_px=4, pooler=False)
    write_dinov2(folder / "dinov2")
    write_siglip2(folder / "siglip2")
    return folder


@pytest.fixture(scope="session")
def dreambench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dreambench(tmp_path_factory.mktemp("data") / "dreambench")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "pipeline")
