"""Models come from where the recipe says, or the user is told in one line why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from datapipe.backends.grounding_dino import OriginalGroundingDino
from datapipe.backends.loading import ModelSettings, check_model, identity, load_checkpoint, load_model
from datapipe.backends.sam import OriginalSam
from datapipe.errors import BackendError
from datapipe.stages import ground, segment
from datapipe.stages.ground import GroundSettings
from datapipe.stages.segment import SegmentSettings
from tests.toy import PROJECT

SAM = str(PROJECT / "toyworld/weights/sam")


def refusal(settings: ModelSettings) -> str:
    with pytest.raises(BackendError) as refused:
        check_model(settings, "segment.model")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_folder_in_hub_format_is_accepted_from_any_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_model(ModelSettings(model="toyworld/weights/sam"), "segment.model")
    check_model(ModelSettings(model=SAM), "segment.model")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    assert "no such folder" in refusal(ModelSettings(model="./none"))
    assert "holds no config.json" in refusal(ModelSettings(model=str(tmp_path)))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not to be had from the hub" in refusal(ModelSettings(model="facebook/sam-vit-huge"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    assert "no GPU" in refusal(ModelSettings(model=SAM, device="cuda"))


def test_half_precision_weights_compute_in_float32_on_a_cpu():
    from transformers import AutoModelForMaskGeneration

    model = load_model(
        ModelSettings(model=SAM, dtype="float16", device="cpu"), AutoModelForMaskGeneration.from_pretrained
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_local_weights_are_known_by_their_content(tmp_path: Path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = identity(ModelSettings(model=str(tmp_path)))
    weights.write_bytes(b"another")
    assert identity(ModelSettings(model=str(tmp_path))) != before
    assert identity(ModelSettings(model="org/name", revision="abc")) == "org/name@abc"


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    import shutil

    from transformers import AutoModelForMaskGeneration

    shutil.copy(f"{SAM}/config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackendError, match="cannot be loaded"):
        load_model(ModelSettings(model=str(tmp_path)), AutoModelForMaskGeneration.from_pretrained)


class Innocent:
    """Unpickling it would run code."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_an_original_checkpoint_must_be_tensors_of_the_model_and_of_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, file = torch.nn.Linear(2, 3), tmp_path / "checkpoint.pth"
    settings = ModelSettings(model=str(file))

    def refused() -> str:
        with pytest.raises(BackendError) as error:
            load_checkpoint(settings, model)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no readable checkpoint" in refused()
    file.write_bytes(b"junk")
    assert "no readable checkpoint" in refused()
    torch.save({"model": Innocent()}, file)
    assert "no readable checkpoint" in refused() and not Path("ran").exists()
    torch.save({"model": {}}, file)
    assert "lacks 2 of the model's tensors (such as weight)" in refused()
    torch.save(torch.nn.Linear(2, 4).state_dict(), file)
    assert "another size" in refused()
    torch.save({"model": {"module.weight": torch.ones(3, 2), "module.bias": torch.zeros(3), "other": 1}}, file)
    load_checkpoint(settings, model)
    assert model.weight.sum() == 6


def test_originals_are_refused_before_the_run_when_a_file_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "there.pth").touch()
    there, absent = str(tmp_path / "there.pth"), str(tmp_path / "absent.pth")
    with pytest.raises(BackendError, match=r"^segment.model .*no such .pth file"):
        segment.check(SegmentSettings(backend="segment_anything", model=absent))
    segment.check(SegmentSettings(backend="segment_anything", model=there))
    with pytest.raises(BackendError, match=r"^segment.model .*set segment.backend"):
        segment.check(SegmentSettings(model=there))
    with pytest.raises(BackendError, match=r"^ground.model .*no such .pth file"):
        ground.check(GroundSettings(backend="groundingdino", model=absent))
    with pytest.raises(BackendError, match=r"^ground.text_encoder bert-base-uncased: not here"):
        ground.check(GroundSettings(backend="groundingdino", model=there))
    with pytest.raises(BackendError, match=r"^ground.text_encoder ./bert: no such folder"):
        ground.check(GroundSettings(backend="groundingdino", model=there, text_encoder="./bert"))


def test_an_original_that_cannot_be_built_is_named(tmp_path):
    with pytest.raises(BackendError, match="no readable checkpoint"):
        OriginalSam(ModelSettings(model=str(tmp_path / "none.pth")), "vit_b")
    with pytest.raises(BackendError, match=r"ground\.text_encoder"):
        OriginalGroundingDino(ModelSettings(model="none.pth"), str(tmp_path), "swint_ogc", 800, 1333, 0.2, 50)


def test_groundingdino_py_is_not_asked_for_half_precision():
    with pytest.raises(ValueError, match="float32 only"):
        GroundSettings(backend="groundingdino", dtype="bfloat16")


def test_the_toy_clip_loads_as_the_hubs_do():
    folder = PROJECT / "toyworld/weights/clip"
    processor = CLIPProcessor.from_pretrained(folder)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    inputs = processor(text=["a red mug"], return_tensors="pt")
    assert inputs["input_ids"].max() < model.config.text_config.vocab_size
