"""The notebooks and scripts in examples/ run as they are, on the toy world."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.toy import PROJECT, Made, write_images

EXAMPLES = PROJECT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture
def desk(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `examples` beside `out/toy`, as in a checkout after `make dataset`."""
    shutil.copytree(made.folder, tmp_path / "out" / "toy")
    (tmp_path / "examples").mkdir()
    for folder in ("manifests", "toyworld"):
        (tmp_path / folder).symlink_to(PROJECT / folder)
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, desk: Path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(desk / "examples")}}).execute()
    pictures = sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", ()))
    assert pictures >= 2, "there is something to look at"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_on_colab_a_notebook_begins_by_installing_the_project(path: Path, monkeypatch: pytest.MonkeyPatch):
    shells = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is not installed")
    first = next(cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code")
    shell, asked = shells.InteractiveShell(), list[str]()
    shell.register_magic_function(asked.append, magic_name="pip")
    shell.run_cell("".join(first["source"])).raise_error()
    assert asked == [], "elsewhere it is installed already"
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    shell.run_cell("".join(first["source"])).raise_error()
    (requirement,) = (Requirement(word) for word in shlex.split(asked[0]) if "git+" in word)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert requirement.name == project["name"] and requirement.url == "git+https://github.com/OWNER/subject-diffusion"
    assert {"demo"} <= requirement.extras <= project["optional-dependencies"].keys()


def script(name: str, *words: str) -> str:
    program = [sys.executable, str(EXAMPLES / name), *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_label_folder(desk: Path):
    write_images(desk / "photos", 12)
    assert "images labeled" in script("label_folder.py", "photos", "labels.jsonl")
    lines = [json.loads(line) for line in (desk / "labels.jsonl").read_text().splitlines()]
    assert len(lines) == len(list((desk / "photos").glob("*.jpg"))) and any(line["entities"] for line in lines)


def test_resume_a_loop(desk: Path):
    assert script("resume_a_loop.py", "out/toy").endswith("\nequal\n")
