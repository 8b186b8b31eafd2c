"""What README and docs tell people to type works: Python blocks run, commands parse, and the ones that look into a
dataset run on a real one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from PIL import Image

from datapipe.recipe import Recipe
from datapipe.schema import IDENTITIES_SCHEMA, SCHEMA, Outcome, Reason, Rejection, StageName
from datapipe.schema.pairs import PairRejection
from datapipe.shards import kept_samples
from tests.documents import Block, blocks, check_parses, marked
from tests.toy import PROJECT
from toyworld.render.web import render_web_image

SHELL = [block for block in blocks() if block.language == "sh"]
PYTHON = [block for block in blocks() if block.language == "python"]


def image(row: int = 4) -> bytes:
    jpeg = render_web_image(row, 300, seed=1).jpeg
    assert jpeg is not None
    return jpeg


@pytest.fixture
def desk(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the documents assume: a dataset in out/toy, a photo, a folder of photos."""
    (tmp_path / "out").mkdir()
    shutil.copytree(made.folder, tmp_path / "out" / "toy")
    (tmp_path / "photos").mkdir()
    for place in ("photo.jpg", "photos/one.jpg"):
        (tmp_path / place).write_bytes(image())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.document}-{block.name}")
def test_every_command_is_one_that_exists(block: Block):
    for program, *words in block.commands:
        if program == "sdd":
            check_parses(words)
        elif program == "make":
            dry = ["make", "-n", "-o", ".venv/installed", *words]
            done = subprocess.run(dry, cwd=PROJECT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            lines = re.findall(r"^\S*/bin/sdd (.*)$", done.stdout.replace("\\\n", " "), re.MULTILINE)
            assert lines, f"make {words} starts no sdd"
            for line in lines:
                check_parses(Block("", "", "sh", line).commands[0])


def test_the_pools_are_ones_that_a_recipe_can_have():
    recipe = Recipe.model_validate(yaml.safe_load(marked("pools").code))
    assert [pool.workers for pool in recipe.run.pools] == [8, 8]


def test_every_block_says_how_it_is_tested():
    tests = "".join(path.read_text("utf-8") for path in (PROJECT / "tests").rglob("*.py"))
    for block in blocks():
        if block.language in ("python", "py"):
            assert block.name, f"{block.document}: a Python block without <!-- test: name -->:\n{block.code}"
            assert f'"{block.name}"' in tests, f"{block.document}: no test runs the block {block.name}"


@pytest.mark.parametrize("name", ["images", "look", "change", "other-tools", "other-trainers", "exports", "card"])
def test_the_commands_that_look_into_a_dataset_run(desk, sdd, name):
    for program, *given in marked(name).commands:
        words = [word.replace("out/photos", "out/toy") for word in given]
        if program != "sdd":
            continue
        if words[0] == "audit":
            words.append("--results")  # there is nobody to answer
        code, _, error = sdd(*words)
        assert code == 0, error
    if name in ("images", "look"):
        assert Image.open("sheet.png").width > 1000, "a sheet of four columns"


@pytest.mark.parametrize("name", ["label", "label-one", "label-many"])
def test_labeling_lines_find_the_butterfly(desk, name):
    names: dict[str, Any] = {}
    exec(re.sub('"(sdd|modern)"', '"toy"', marked(name).code), names)
    assert [entity.tag for entity in names["sample"].entities] == ["butterfly"]


@pytest.mark.parametrize("name", ["table", "arrow", "duckdb-files"])
def test_table_lines_read_every_row(desk, made, name, capfd):
    names: dict[str, Any] = {}
    exec(marked(name).code, names)
    if name == "arrow":
        assert names["kept"].num_rows == sum(1 for _ in names["read_samples"]("out/toy"))
    else:
        assert "http_status" in capfd.readouterr().out


def test_polars_lines(desk):
    names: dict[str, Any] = {}
    exec(marked("polars").code, names)
    assert set(names["tags"].columns) == {"tag", "len"} and len(names["tags"]) > 3


@pytest.fixture
def exported(desk, sdd) -> Path:
    for _, *words in marked("exports").commands:
        code, _, error = sdd(*words)
        assert code == 0, error
    folder: Path = desk
    return folder


def printed(code: str, home: Path) -> str:
    """What code prints that runs in a process and a home of its own."""
    places = {"HOME": str(home), "YOLO_CONFIG_DIR": str(home), "FIFTYONE_DATABASE_DIR": str(home / "db")}
    offline = {"FIFTYONE_DO_NOT_TRACK": "1", "FIFTYONE_DATABASE_VALIDATION": "0", "YOLO_OFFLINE": "1"}
    environment = {**os.environ, **places, **offline}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(package: str) -> pytest.MarkDecorator:
    """Not pytest.importorskip: an import of these writes to the user's home."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@needs("fiftyone")
def test_fiftyone_lines(exported, tmp_path, made):
    show = "print([[d.label for d in s.detections.detections] for s in data])"
    tags = [[e.tag for e in sample.entities] for sample in kept_samples(made.store)]
    assert printed(f"{marked('fiftyone').code}\n{show}", tmp_path).splitlines()[-1] == str(tags)


@needs("ultralytics")
def test_ultralytics_lines(exported, tmp_path):
    tiny = f"imgsz=64, workers=0, plots=False, project={str(tmp_path / 'runs')!r}"
    code = marked("ultralytics").code
    for full, small in (("-seg.pt", "-seg.yaml"), ("epochs=100", "epochs=1"), ("imgsz=640", tiny)):
        assert full in code
        code = code.replace(full, small)
    printed(code, tmp_path)
    assert list(tmp_path.glob("runs/*/weights/best.pt"))


def test_datasets_lines(desk, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names: dict[str, Any] = {}
    exec(marked("datasets").code, names)
    assert names["data"][0]["json"]["entities"] and names["data"][0]["jpg"].width > 0


@pytest.mark.parametrize("name", ["stream", "stream-mixed"])
def test_stream_lines_give_batches_and_go_on(desk, name):
    names: dict[str, Any] = {}
    exec(marked(name).code, names)
    assert names["batch"]["image"].shape == (16, 3, 128, 128)
    assert names["state"]["index"] == 16
    names["loader"].load_state_dict(names["state"])
    assert next(iter(names["loader"]))["key"] != names["batch"]["key"]


def test_torch_lines(desk):
    names: dict[str, Any] = {}
    exec(marked("torch").code, names)
    assert names["batch"]["image"].shape == (16, 3, 128, 128)


def types_of(table: str) -> dict[str, str]:
    """Name to type of the rows of a Markdown table in the data format's page, under a heading."""
    page = (PROJECT / "docs" / "data-format.md").read_text("utf-8")
    section = page.split(f"\n## {table}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", section, re.MULTILINE))


def flat(schema: Any) -> dict[str, str]:
    """Name to Arrow type, with a row for each field of a list of structs."""
    found = {}
    for field in schema:
        inner = field.type.value_type if isinstance(field.type, pa.ListType) else None
        if isinstance(inner, pa.StructType):
            found[field.name] = "list<struct>"
            found |= {f"{field.name}.{name}": kind for name, kind in flat(list(inner)).items()}
        else:
            found[field.name] = str(field.type)
    return found


def test_the_format_page_has_every_column_with_its_type():
    assert types_of("Parquet sidecar") == flat(SCHEMA)
    assert types_of("Identities") == flat(IDENTITIES_SCHEMA)


def test_the_format_page_has_every_field_of_a_samples_json(made):
    with tarfile.open(next(made.folder.glob("shard-*.tar"))) as tar:
        file = tar.extractfile(next(m for m in tar.getmembers() if m.name.endswith(".json")))
        assert file is not None
        tree = json.load(file)
    names = set(tree) | {f"entities.{name}" for name in tree["entities"][0]}
    names |= {f"tags.{name}" for name in tree["tags"][0]}
    types = types_of("Sample JSON")
    assert names <= set(types)
    assert all(types[name].endswith("or absent") for name in set(types) - names)


def test_the_format_page_has_every_value_of_the_closed_lists():
    page = (PROJECT / "docs" / "data-format.md").read_text("utf-8")
    for kind in (Outcome, StageName, Reason, Rejection, PairRejection):
        for value in kind:
            assert f"`{value.value}`" in page, f"{kind.__name__} {value.value}"


def test_the_documentation_builds_without_a_warning(tmp_path):
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(program, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "subject_diffusion.labeling.label" in (tmp_path / "site" / "api" / "index.html").read_text()
