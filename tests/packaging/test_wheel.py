"""What is built is whole: installed elsewhere, without the repository, `sdd` works from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from datapipe.schema import Reason, Slice, StageName
from datapipe.shards import Store, write_shard
from subject_diffusion._version import __version__
from tests.conftest import kept_sample
from tests.toy import PROJECT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the sdist and the wheel made of it."""
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

    def make(kind: str, where: Path) -> None:
        command = [sys.executable, "-c", build, kind, str(folder)]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    make("build_sdist", PROJECT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        sdist.extractall(source, filter="data")
    make("build_wheel", next(source.iterdir()))
    return folder


@pytest.fixture(scope="module")
def bin_folder(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel, and finds the dependencies, and only them, in this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin/python"
    (site,) = environment.glob("lib/python*/site-packages")
    # As a line of a .pth file: an editable install's own .pth in there is then not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--force-reinstall", "--ignore-installed", str(wheel)], check=True)
    return environment / "bin"


@pytest.fixture
def installed(bin_folder, tmp_path):
    """Runs a command of the environment from an unrelated folder."""
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def command(program: str, *words: str) -> str:
        done = subprocess.run(
            [bin_folder / program, *words], cwd=tmp_path, env=outside, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return command


def test_the_command_works_from_any_folder(installed, tmp_path, provenance):
    where = "import datapipe, subject_diffusion.packaged as p; print(datapipe.__file__, p.recipe_path('toy'))"
    assert str(PROJECT) not in installed("python", "-c", where)
    assert installed("sdd", "--version") == f"sdd {__version__}\n"
    assert "min_score" in installed("python", "-m", "sdd", "recipe")
    assert "--recipe" in installed("sdd", "dataset", "--recipe", "toy", "--help")
    dropped = kept_sample(1).dropped(StageName.SELECT, Reason.TOO_FEW_ENTITIES)
    write_shard(Store(str(tmp_path / "set")), "shard", Slice(0, (kept_sample(0), dropped)), provenance)
    assert "too_few_entities" in installed("sdd", "inspect", "set")


def test_the_models_of_the_toy_recipe_come_along(installed):
    check = (
        "from datapipe.recipe import check_stages, load_recipe; check_stages(load_recipe('toy'));"
        "from subject_diffusion.packaged import local_path;"
        "assert local_path('toyworld/weights/stable-diffusion').is_dir();"
        "assert local_path('toyworld/weights/clip').is_dir()"
    )
    installed("python", "-c", check)


def test_a_package_index_would_take_it(built):
    pytest.importorskip("twine")
    files = sorted(map(str, built.iterdir()))
    assert [Path(f).name for f in files] == [
        f"subject_diffusion-{__version__}-py3-none-any.whl",
        f"subject_diffusion-{__version__}.tar.gz",
    ]
    check = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_tells_type_checkers_of_its_types(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for package in ("datapipe", "model", "sdd", "subject_diffusion", "toyworld", "train"):
        assert f"{package}/py.typed" in names
