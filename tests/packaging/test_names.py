"""Packages of the same names that are somebody else's are refused by name; so is what an extra would have brought."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from subject_diffusion._extras import help_for
from tests.toy import PROJECT

BASE_LEAVES_OUT = (
    "accelerate", "diffusers", "faiss", "gcsfs", "gradio", "groundingdino", "h11", "huggingface_hub", "imagehash",
    "pandas", "peft", "protego", "psutil", "ray", "requests", "s3fs", "safetensors", "scipy", "segment_anything",
    "spacy", "tenacity", "tensorboard", "torch", "torchvision", "transformers", "webdataset",
)  # fmt: skip
BLOCKER = f"""
import sys
from importlib.machinery import PathFinder
class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in {BASE_LEAVES_OUT}
        return None if missing else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
"""


def sdd(*words: str, first_on_path: Path = PROJECT, code: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(first_on_path), str(PROJECT)])
    program = f"{code}\nfrom sdd.__main__ import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd="/",
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["model/__init__.py", "train.py"])
def test_a_foreign_package_of_the_same_name_is_named(tmp_path, name):
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("")
    done = sdd("--version", first_on_path=tmp_path)
    assert done.returncode == 2
    assert str(foreign) in done.stderr and done.stderr.startswith("sdd: ")
    assert done.stderr.count("\n") == 1


def test_a_folder_of_the_same_name_that_is_no_package_is_no_clash(tmp_path):
    (tmp_path / "model").mkdir()
    assert sdd("--version", first_on_path=tmp_path).returncode == 0


@pytest.fixture
def base_only():
    """`sdd` where only what the base installation brings can be imported."""

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return sdd(*words, code=BLOCKER)

    return command


EACH = """
import json, sys
from sdd.__main__ import main
for words in json.loads(sys.argv.pop(1)):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{words}: {ended.code}")
sys.exit(0)
"""


def test_the_base_installation_is_enough_for_looking_into_datasets(made, tmp_path):
    folder, copy, page, coco = str(made.folder), str(tmp_path / "copy"), str(tmp_path / "page"), str(tmp_path / "coco")
    commands = (
        ("status", folder),
        ("inspect", folder),
        ("verify", folder),
        ("report", folder, "--save", page),
        ("card", folder, "--save", page),
        ("audit", folder, "--results"),
        ("export", folder, "--to", "coco", "--out", coco),
        ("import", f"{coco}/annotations.json", "--images", f"{coco}/images", "--out", str(tmp_path / "imported")),
        ("export", folder, "--to", "yolo", "--out", str(tmp_path / "yolo")),
        ("reselect", folder, "--set", "select.min_score=0.95", "--out", copy),
        ("diff", folder, copy),
        ("recipe",),
    )
    done = sdd(json.dumps(commands), code=BLOCKER + EACH)
    assert done.returncode == 0, done.stderr


def test_the_base_installation_is_enough_for_reading_rows_and_samples(made):
    read = f"rows = open_dataset({str(made.folder)!r}); samples = list(read_samples({str(made.folder)!r}))"
    program = f"{BLOCKER}\nfrom subject_diffusion import open_dataset, read_samples\n{read}"
    check = "assert samples[0].entities[0].mask.array().any() and rows.count_rows() > len(samples)"
    command = [sys.executable, "-c", f"{program}\n{check}"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("train",), "train"),
        (("evaluate",), "train"),
        (("compare", "result.json"), "train"),
        (("ablate",), "train"),
        (("sweep", "--over", "optimizer.lr=[1]"), "train"),
        (("demo",), "page"),
        (("sample", "a mug", "--subject", "mug=mug.png"), "train"),
        (("dataset", "--out", "{folder}"), "label"),
        (("inspect", "s3://bucket/set"), "s3"),
        (("inspect", "gs://bucket/set"), "gs"),
    ],
)
def test_a_command_whose_extra_is_missing_says_which(base_only, tmp_path, words, extra):
    done = base_only(*(word.format(folder=tmp_path) for word in words))
    assert done.returncode == 2
    assert f"pip install '.[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_doctor_names_the_missing_extra_among_its_checks(base_only, tmp_path):
    done = base_only("doctor", "toy", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "FAIL  torch is not installed; in the project's folder, pip install '.[label]' brings it" in done.stdout


@pytest.mark.parametrize(
    ("use", "extra"), [("label('a.jpg')", "label"), ("Stream", "stream"), ("SubjectDiffusionPipeline", "train")]
)
def test_a_name_whose_extra_is_missing_says_which(use, extra):
    program = f"{BLOCKER}\nimport subject_diffusion\nsubject_diffusion.{use}"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert f"pip install '.[{extra}]'" in done.stderr


def test_only_packages_of_extras_are_explained():
    assert help_for(ModuleNotFoundError(name="datapipe.none")) is None
    assert "--no-deps groundingdino-py" in (help_for(ModuleNotFoundError(name="groundingdino.models")) or "")
