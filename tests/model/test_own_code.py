"""A saved pipeline carries its own code, and runs where diffusers alone is installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from model import Subject, SubjectDiffusion, SubjectDiffusionPipeline
from model.reference import fill_holes
from model.single_file import NET_MODULES, PIPELINE_MODULES, single_file
from tests.backends.hub_server import Hub, Repository
from tests.model.bases import awaken, settings
from tests.toy import PROJECT

# Nothing of this project, nor what it needs beyond diffusers, can be imported.
_ALONE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Alone(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {refused} else super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Alone]
import numpy as np, torch
from diffusers import DiffusionPipeline
from PIL import Image

pipe = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
subject = pipe.make_subject(Image.open({picture!r}), "mug")
options = dict(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(3))
np.save({out!r}, pipe("a mug", subject, **options).images)
pipe.save_pretrained({again!r})
"""
_REFUSED = {"model", "train", "datapipe", "sdd", "subject_diffusion", "toyworld", "pydantic", "scipy", "peft"}


@pytest.fixture
def pipe(sd2: Path, clip: Path) -> SubjectDiffusionPipeline:
    torch.manual_seed(0)
    net = awaken(SubjectDiffusion.from_base(sd2, settings(), image_encoder=clip)).subject_net
    made = SubjectDiffusionPipeline.from_base(sd2, clip, net)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_folder_is_read_by_diffusers_alone_and_saved_again(pipe: SubjectDiffusionPipeline, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mug.png")
    pipe.save_pretrained(tmp_path / "pipeline")
    names = {"folder": "pipeline", "picture": "mug.png", "out": "found.npy", "again": "again"}
    script = _ALONE.format(refused=_REFUSED, **{name: str(tmp_path / file) for name, file in names.items()})
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_MODULES_CACHE": str(tmp_path / "hf")
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Expected types" not in done.stderr
    subject, noise = Subject(tmp_path / "mug.png", "mug"), torch.Generator().manual_seed(3)
    expected = pipe("a mug", subject, num_inference_steps=2, output_type="np", generator=noise).images
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, rtol=1e-3, atol=1e-3)
    for name in ("pipeline.py", "subject_net/subject_net.py"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "pipeline" / name).read_text()
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "SubjectDiffusionPipeline"]
    assert index["subject_net"] == ["subject_net", "SubjectNet"]


def test_the_project_never_executes_a_folders_code(pipe: SubjectDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    for name in ("pipeline.py", "subject_net/subject_net.py"):
        (tmp_path / name).write_text("raise SystemExit('executed')")
    assert type(SubjectDiffusionPipeline.from_pretrained(tmp_path)) is SubjectDiffusionPipeline


def test_folders_of_0_2_0_which_carry_no_code_are_read(pipe: SubjectDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": "SubjectDiffusionPipeline", "subject_net": ["model.subject_net", "SubjectNet"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name in ("pipeline.py", "subject_net/subject_net.py"):
        (tmp_path / name).unlink()
    assert type(SubjectDiffusionPipeline.from_pretrained(tmp_path)) is SubjectDiffusionPipeline


@pytest.mark.parametrize("modules", [NET_MODULES, PIPELINE_MODULES], ids=["net", "pipeline"])
def test_no_name_of_the_single_file_hides_another(modules: tuple[str, ...]) -> None:
    names = []
    for node in ast.parse(single_file(modules)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        if isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    assert len(names) == len(set(names))


def test_pushing_while_saving_is_refused_in_one_line(pipe: SubjectDiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call pipe\.push_to_hub"):
        pipe.save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
def test_holes_are_those_that_scipy_fills(density: float) -> None:
    for seed in range(20):
        mask = np.random.default_rng(seed).random((17, 23)) < density
        np.testing.assert_array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


def test_a_repository_on_the_hub_is_read_the_same_way(pipe: SubjectDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "pipeline")
    commit = "1" * 40
    hub = Hub({"toy/subjects": Repository({"main": commit}, {commit: tmp_path / "pipeline"})})
    load = "{kind}.from_pretrained('toy/subjects'{trust}); print(type(pipe).__module__)"
    with hub.served():
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        found = {}
        for package, kind, trust in [
            ("diffusers", "DiffusionPipeline", ", trust_remote_code=True"),
            ("model", "SubjectDiffusionPipeline", ""),
        ]:
            script = f"from {package} import {kind}; pipe = " + load.format(kind=kind, trust=trust)
            command = [sys.executable, "-c", script]
            done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            found[package] = done.stdout.strip()
    assert found["diffusers"].startswith("diffusers_modules.") and found["model"] == "model.pipeline"
