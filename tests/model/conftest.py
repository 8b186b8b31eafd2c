"""Folders of tiny bases, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.bases import write_base, write_clip, write_xl_base


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), whole=True)


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("sd2"), "sd2")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xl_base(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def base(request: pytest.FixtureRequest) -> Path:
    """Either kind of base."""
    folder: Path = request.getfixturevalue(request.param)
    return folder
