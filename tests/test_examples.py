"""The notebooks and scripts in examples/ run as they are, on the toy world."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

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


ADDRESS = "https://github.com/someone/subject-diffusion"


@pytest.fixture
def notebook_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder served as Colab serves what it tells about the notebook that is open."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
        monkeypatch.setenv("KMP_TARGET_PORT", str(server.server_port))
        yield tmp_path
        server.shutdown()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("opened", [f"fileId={quote(ADDRESS)}/blob/main/examples/a.ipynb", "fileId=1AbCd", None])
def test_on_colab_a_notebook_begins_by_installing_the_project(
    path: Path, opened: str | None, notebook_server: Path, monkeypatch: pytest.MonkeyPatch
):
    shells = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is not installed")
    first = next(cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code")
    shell, installed, asked = shells.InteractiveShell(), list[str](), list[str]()
    shell.register_magic_function(installed.append, magic_name="pip")
    shell.run_cell("".join(first["source"])).raise_error()
    assert installed == [], "elsewhere it is installed already"
    if opened:
        (notebook_server / "api").mkdir()
        (notebook_server / "api" / "sessions").write_text(json.dumps([{"name": "a.ipynb", "path": opened}]))
    else:
        monkeypatch.delenv("KMP_TARGET_PORT")
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return f"{ADDRESS} "

    monkeypatch.setattr("builtins.input", answer)
    shell.run_cell("".join(first["source"])).raise_error()
    assert len(asked) == (opened is None or "github" not in opened)
    (requirement,) = (Requirement(word) for word in shlex.split(installed[0]) if "git+" in word)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert requirement.name == project["name"] and requirement.url == f"git+{ADDRESS}"
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
