"""A dataset made once by the real pipeline from the toy web, for everything that looks into datasets."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from datapipe.shards import Store
from sdd.cli import main
from tests.toy import PROJECT, run, write_recipe

IMAGES = 120
PORT = 18643
SELECT = {"min_score": 0.88, "min_entities": 2}
"""Strict, so that there are images lost at selection too."""


@dataclass(frozen=True)
class Made:
    """`folder`: of the dataset; `truth`: the table that the toy web was drawn from."""

    folder: Path
    truth: Path

    @property
    def store(self) -> Store:
        return Store(str(self.folder))


def make(folder: Path, select: dict[str, object]) -> None:
    """A full run over the toy web with these settings of selection."""
    recipe = write_recipe(
        folder.with_suffix(".yaml"), toyworld={"images": IMAGES, "port": PORT}, slice_rows=40, select=select
    )
    done = run(recipe, None, folder)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made") / "toy"
    make(folder, SELECT)
    return Made(folder, PROJECT / f"out/toyweb-{IMAGES}-0-{PORT}/truth.parquet")


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Path:
    """The dataset, to be damaged."""
    return shutil.copytree(made.folder, tmp_path / "toy")


Sdd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sdd(capsys: pytest.CaptureFixture[str]) -> Sdd:
    """A command: its exit code, standard output and standard error."""

    def command(*words: str | Path) -> tuple[int, str, str]:
        sys.argv = ["sdd", *map(str, words)]
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


@pytest.fixture
def refused(sdd: Sdd) -> Callable[..., str]:
    """What a command says in one line when it cannot be done."""

    def command(*words: str | Path) -> str:
        code, _, error = sdd(*words)
        assert code == 2, error
        assert error.startswith("sdd: ")
        assert error.count("\n") == 1, error
        return error

    return command
