"""Models come from where the recipe says, or the user is told in one line why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from datapipe.backends.loading import ModelSettings, check_model, identity, load_model
from datapipe.errors import BackendError
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


def test_the_toy_clip_loads_as_the_hubs_do():
    folder = PROJECT / "toyworld/weights/clip"
    processor = CLIPProcessor.from_pretrained(folder)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    inputs = processor(text=["a red mug"], return_tensors="pt")
    assert inputs["input_ids"].max() < model.config.text_config.vocab_size
