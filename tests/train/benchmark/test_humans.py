"""People are scored by their faces, and a picture without one scores 0."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from subject_diffusion.errors import BackendError
from tests.train.benchmark.folders import CLIP

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
needs_facenet = pytest.mark.skipif(
    importlib.util.find_spec("facenet_pytorch") is None,
    reason="facenet-pytorch is not installed (pip install --no-deps facenet-pytorch==2.6.0)",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones, in a file as facenet-pytorch publishes them, with the classes that were trained on."""
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(0)
    state = InceptionResnetV1().state_dict() | {"logits.weight": torch.zeros(3, 512), "logits.bias": torch.zeros(3)}
    file: Path = tmp_path_factory.mktemp("face") / "vggface2.pt"
    torch.save(state, file)
    return file


@needs_facenet
def test_a_face_is_found_and_embedded_and_no_face_is_zero(weights):
    from train.benchmark.faces import Faces
    from train.benchmark.options import BackboneSettings

    photograph = Image.open(PHOTOGRAPH)
    empty = Image.new("RGB", (128, 128), (90, 120, 90))
    found = Faces(BackboneSettings(model=str(weights))).images([photograph, ImageOps.mirror(photograph), empty])
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    assert float(found[0] @ found[0]) == pytest.approx(1, abs=1e-5) and float(found[0] @ found[2]) == 0


@needs_facenet
def test_a_file_that_holds_other_weights_is_refused(tmp_path):
    from train.benchmark.faces import Faces
    from train.benchmark.options import BackboneSettings

    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(BackendError, match="missing"):
        Faces(BackboneSettings(model=str(tmp_path / "other.pt")))
    (tmp_path / "code.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(BackendError, match="cannot be loaded"):
        Faces(BackboneSettings(model=str(tmp_path / "code.pt")))


@needs_facenet
def test_people_are_drawn_and_scored(sdd, pipeline, weights, tmp_path):
    people = tmp_path / "people"
    (people / "grace").mkdir(parents=True)
    Image.open(PHOTOGRAPH).save(people / "grace/00.jpg")
    ImageOps.mirror(Image.open(PHOTOGRAPH)).save(people / "grace/01.jpg")
    lists = "subject_name,class\ngrace,woman\n\n'a {0} {1} reading a book'.format(unique_token, class_token)\n"
    (people / "prompts_and_classes.txt").write_text(lists)
    code, printed, error = sdd(
        "evaluate", pipeline, "--suite", "humans", "--data", people, "--out", tmp_path / "out", "--per-prompt", "2",
        "--set", "num_inference_steps=1", "--backbone", f"face={weights}", "--backbone", f"clip={CLIP}",
    )  # fmt: skip
    assert code == 0, error
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert [image["prompt"] for image in result["images"]] == ["a woman reading a book"] * 2
    assert result["overall"]["face"] == {"mean": 0, "low": 0, "high": 0}, "the toy model draws no faces"
    assert result["ceiling"]["face"]["mean"] > 0.5 and np.isfinite(result["overall"]["clip_t"]["mean"])
    assert "0.605" in printed and "0.228" in printed


def test_what_faces_need_is_told_before_anything_is_loaded(refused, monkeypatch, tmp_path, dreambench):
    asked = ["evaluate", "--suite", "humans", "--data", dreambench, "--backbone"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "facenet_pytorch" else object())
    assert "pip install --no-deps facenet-pytorch==2.6.0" in refused(*asked, "face=weights.pt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "face=weights.pt: no such file" in refused(*asked, "face=weights.pt")
