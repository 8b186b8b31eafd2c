"""Models come from where the recipe says, whole, or the user is told in one line why not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskGeneration, CLIPModel, CLIPProcessor

from datapipe.backends.grounding_dino import Asking, OriginalGroundingDino, TransformersGroundingDino
from datapipe.backends.hub_format import folder_digest
from datapipe.backends.image_to_text import ImageToText
from datapipe.backends.loading import (
    ModelSettings,
    check_model,
    load_model,
    load_original_checkpoint,
    locate,
    model_identity,
)
from datapipe.backends.sam import OriginalSam, TransformersSam
from datapipe.shards import Store
from datapipe.stages.caption import CaptionSettings
from datapipe.stages.ground import GroundSettings
from datapipe.stages.segment import SegmentSettings
from datapipe.stages.stage import StageSettings
from subject_diffusion import node_copy
from subject_diffusion.errors import BackendError
from tests.toy import PROJECT
from toyworld.pretrain.vocabulary import build_tokenizer

WEIGHTS = PROJECT / "toyworld/weights"
SAM = str(WEIGHTS / "sam")
ASKING = Asking(64, 64, pad_multiple=1, separator="period", floor=0.2, most=50)
PIXELS: dict[str, Any] = {"min_pixels": 1, "max_pixels": 10**6}
STAGES: dict[str, type[CaptionSettings | GroundSettings | SegmentSettings]] = {
    "blip": CaptionSettings,
    "grounding-dino": GroundSettings,
    "sam": SegmentSettings,
}


def refusal(check: Callable[[], object]) -> str:
    with pytest.raises(BackendError) as refused:
        check()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def copy_of(model: str, tmp_path: Path) -> Path:
    return shutil.copytree(WEIGHTS / model, tmp_path / model)


def stage_of(folder: Path) -> StageSettings:
    return STAGES[folder.name](model=str(folder))


def test_a_model_in_a_bucket_is_copied_once_and_is_the_same_model(bucket, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(node_copy, "COPIES", tmp_path / "copies")
    store = Store(f"{bucket}/models/sam")
    for path in Path(SAM).iterdir():
        store.put(path.name, path.read_bytes())
    store.put("pytorch_model.bin", b"the same again")
    here, there = ModelSettings(model=SAM), ModelSettings(model=store.root)
    check_model(there)
    (copy,) = (path for path in (tmp_path / "copies").iterdir() if path.is_dir())
    state = copy.stat().st_mtime_ns
    loaded = load_model(there, AutoModelForMaskGeneration).state_dict()
    for name, tensor in load_model(here, AutoModelForMaskGeneration).state_dict().items():
        assert torch.equal(loaded[name], tensor)
    assert model_identity(there).rpartition("@") == (store.root, "@", model_identity(here).rpartition("@")[2])
    assert copy.stat().st_mtime_ns == state and capsys.readouterr().err.count("fetching") == 1, "only once"
    assert not (copy / "pytorch_model.bin").exists()
    nowhere = refusal(lambda: check_model(ModelSettings(model=f"{bucket}/nowhere")))
    assert nowhere == f"model {bucket}/nowhere: no folder with a model in hub format; check the URL"


@pytest.fixture
def mounts(monkeypatch, tmp_path):
    """Says which folders are on which file systems, in place of the system."""

    def mount(**kinds: str) -> None:
        lines = [f"server:/x {tmp_path / folder} {kind} rw 0 0\n" for folder, kind in kinds.items()]
        (tmp_path / "mounts").write_text("".join(["/dev/vda / ext4 rw 0 0\n", *lines]))

    monkeypatch.setattr(node_copy, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(node_copy, "COPIES", tmp_path / "copies")
    return mount


def test_a_folder_on_a_network_file_system_is_copied_once_and_again_when_it_changed(mounts, tmp_path, capsys):
    (tmp_path / "shared").mkdir()
    folder = copy_of("sam", tmp_path / "shared")
    (folder / "pytorch_model.bin").write_bytes(b"the same again")
    for kind in ("ext4", "fuse.portal"):
        mounts(shared=kind)
        assert locate(ModelSettings(model=str(folder))) == str(folder)
    for kind in ("nfs4", "lustre", "fuse.gcsfuse"):
        mounts(shared=kind)
        (copy,) = {locate(ModelSettings(model=str(folder))) for _ in range(2)}
        assert Path(copy).parent == tmp_path / "copies"
    assert capsys.readouterr().err.count("fetching") == 1
    load_model(ModelSettings(model=str(folder)), AutoModelForMaskGeneration)
    assert model_identity(ModelSettings(model=str(folder))) == f"{folder}@{folder_digest(folder)}"
    assert not (Path(copy) / "pytorch_model.bin").exists()
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b"\n")
    changed = Path(locate(ModelSettings(model=str(folder))))
    assert changed != Path(copy) and (changed / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_where_a_copy_would_not_be_on_this_machine_or_has_no_room_the_folder_is_read_where_it_is(
    mounts, monkeypatch, tmp_path
):
    (tmp_path / "shared").mkdir()
    folder = copy_of("sam", tmp_path / "shared")
    mounts(shared="nfs4", copies="nfs4")
    assert locate(ModelSettings(model=str(folder))) == str(folder)
    mounts(shared="nfs4")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert locate(ModelSettings(model=str(folder))) == str(folder)
    assert not [path for path in (tmp_path / "copies").iterdir() if path.is_dir()]


def test_a_folder_in_hub_format_is_accepted_from_any_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_model(ModelSettings(model="toyworld/weights/sam"))
    check_model(ModelSettings(model=SAM))
    for model in STAGES:
        stage_of(WEIGHTS / model).check()


def test_what_is_not_there_is_named(tmp_path):
    assert "model ./none: no such folder" in refusal(lambda: check_model(ModelSettings(model="./none")))
    assert "holds no config.json" in refusal(lambda: check_model(ModelSettings(model=str(tmp_path))))


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def split(folder: Path) -> None:
    """The weights in two files with an index, as large models have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def missing_one_of_several(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def pointer(name: str) -> Callable[[Path], object]:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    return lambda folder: (folder / name).write_text(text)


def cut_short(bytes_left: int) -> Callable[[Path], object]:
    def cut(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:bytes_left])

    return cut


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize("model", STAGES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("model.safetensors"), "holds no weights (model.safetensors)"),
        (only_pickled, "has its weights as pytorch_model.bin only"),
        (missing_one_of_several, "model-00002-of-00002.safetensors is missing"),
        (pointer("model.safetensors"), "model.safetensors is a git-LFS pointer"),
        (cut_short(0), "model.safetensors is empty"),
        (cut_short(60), "model.safetensors is cut short or no safetensors file"),
        (cut_short(500_000), "model.safetensors has 500,000 bytes where"),
        (written("model.safetensors", "<html>not found, and a page that says so at length</html>"), "no safetensors"),
        (written("config.json", '{"model_type": '), "config.json is no JSON"),
        (pointer("config.json"), "config.json is a git-LFS pointer"),
        (written("generation_config.json", "{"), "generation_config.json is no JSON"),
        (without("config.json"), "holds no config.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_is_not_whole_is_refused_before_anything_is_loaded(tmp_path, model, damage, said):
    folder = copy_of(model, tmp_path)
    damage(folder)
    line = refusal(stage_of(folder).check)
    assert said in line
    assert line.startswith(f"{STAGES[model].key} {folder}: ")


def test_weights_in_several_files_are_as_good(tmp_path):
    folder = copy_of("sam", tmp_path)
    split(folder)
    stage_of(folder).check()
    load_model(ModelSettings(model=str(folder)), AutoModelForMaskGeneration)


@pytest.mark.parametrize(
    ("model", "file", "said"),
    [
        ("blip", "processor_config.json", "without an image processor"),
        ("blip", "tokenizer.json", "without a tokenizer"),
        ("grounding-dino", "tokenizer.json", "without a tokenizer"),
    ],
)
def test_a_processor_or_tokenizer_that_is_missing_is_named(tmp_path, model, file, said):
    folder = copy_of(model, tmp_path)
    (folder / file).unlink()
    assert said in refusal(stage_of(folder).check)


@pytest.mark.parametrize(
    ("stage", "model_type", "said"),
    [
        (GroundSettings, "owlv2", "a model of type owlv2, where grounding-dino or mm-grounding-dino is wanted"),
        (SegmentSettings, "sam3", "a model of type sam3, where sam or sam_hq or sam2 or"),
        (SegmentSettings, "nonsense", "a model of type nonsense"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_it_is_loaded(tmp_path, stage, model_type, said):
    folder = copy_of("grounding-dino", tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert said in refusal(stage(model=str(folder)).check)


def test_what_only_loading_shows_is_one_line_too(tmp_path):
    clip = ModelSettings(model=str(WEIGHTS / "clip"))
    assert "a clip model, where one for ImageTextToText is wanted" in refusal(
        lambda: ImageToText(clip, "", 5, 1, **PIXELS)
    )
    folder = copy_of("blip", tmp_path)
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    assert "nonsense" in refusal(lambda: ImageToText(ModelSettings(model=str(folder)), "", 5, 1, **PIXELS))
    (folder / "config.json").write_text('{"model_type": "blip", "vision_config": 7}')
    assert "cannot be loaded" in refusal(lambda: ImageToText(ModelSettings(model=str(folder)), "", 5, 1, **PIXELS))


def test_a_package_that_a_model_needs_and_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    build_tokenizer().save_pretrained(tmp_path)
    kinds = {"processor_class": "SmolVLMProcessor", "image_processor_type": "SmolVLMImageProcessor"}
    (tmp_path / "config.json").write_text('{"model_type": "smolvlm"}')
    (tmp_path / "processor_config.json").write_text(json.dumps(kinds))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(kinds | {"video_processor_type": "SmolVLMVideoProcessor"})
    )
    line = refusal(lambda: ImageToText(CaptionSettings(model=str(tmp_path)), "", 5, 1, **PIXELS))
    assert line.startswith(f"caption.model {tmp_path}: cannot be loaded: Package `num2words` is required")
    assert "pip install num2words" in line


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BUILDERS: dict[str, Callable[[ModelSettings], object]] = {
    "blip": lambda settings: ImageToText(settings, "", 5, 1, **PIXELS),
    "grounding-dino": lambda settings: TransformersGroundingDino(settings, ASKING),
    "sam": TransformersSam,
}


@pytest.mark.parametrize("model", STAGES)
def test_weights_that_lack_tensors_or_have_others_are_refused_by_name(tmp_path, model):
    folder = copy_of(model, tmp_path)
    settings = ModelSettings(model=str(folder))
    names = sorted(load_file(folder / "model.safetensors"))
    weight = next(name for name in names if name.endswith(("layer_norm1.weight", "fc1.weight")))

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        tensors[weight] = torch.ones(3, 2)
        tensors["another.weight"] = torch.ones(1)

    change_tensors(folder, replace)
    line = refusal(lambda: BUILDERS[model](settings))
    assert f"of another shape: 1 (such as {weight})" in line
    assert "not the model's: 1 (such as another.weight)" in line

    def delete(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[weight], tensors["another.weight"]

    change_tensors(folder, delete)
    assert f"missing: 1 (such as {weight})" in refusal(lambda: BUILDERS[model](settings))


def test_a_tokenizer_must_know_words_and_the_numbers_that_the_detector_has_built_in(tmp_path):
    folder = copy_of("grounding-dino", tmp_path)
    detector = ModelSettings(model=str(folder))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["."], vocabulary["?"] = vocabulary["?"], vocabulary["."]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer has . as number 1029, where the model has 1012 built in" in refusal(
        lambda: TransformersGroundingDino(detector, ASKING)
    )
    (folder / "tokenizer.json").unlink()
    assert "its tokenizer knows no words" in refusal(lambda: TransformersGroundingDino(detector, ASKING))
    captioner = copy_of("blip", tmp_path)
    (captioner / "tokenizer.json").unlink()
    assert "its tokenizer knows no words" in refusal(
        lambda: ImageToText(ModelSettings(model=str(captioner)), "", 5, 1, **PIXELS)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    assert "no GPU" in refusal(lambda: check_model(ModelSettings(model=SAM, device="cuda")))


def test_half_precision_weights_compute_in_float32_on_a_cpu():
    model = load_model(ModelSettings(model=SAM, dtype="float16", device="cpu"), AutoModelForMaskGeneration)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
     "processor_config.json", "chat_template.jinja", "qformer_tokenizer/vocab.txt"],
)  # fmt: skip
def test_a_local_model_is_known_by_all_that_decides_its_answers(tmp_path: Path, file):
    folder = copy_of("blip", tmp_path)
    settings = ModelSettings(model=str(folder))
    before = model_identity(settings)
    assert model_identity(ModelSettings(model=str(copy_of("blip", tmp_path / "again")))).partition("@")[2] in before
    (folder / file).parent.mkdir(exist_ok=True)
    with (folder / file).open("ab") as opened:
        opened.write(b" ")
    assert model_identity(settings) != before


def test_what_decides_nothing_changes_no_identity(tmp_path: Path):
    folder = copy_of("blip", tmp_path)
    before = model_identity(ModelSettings(model=str(folder)))
    (folder / "README.md").write_text("a card")
    (folder / ".cache").mkdir()
    (folder / ".cache/notes.json").write_text("{}")
    assert model_identity(ModelSettings(model=str(folder))) == before
    assert model_identity(ModelSettings(model="org/name", revision="abc")) == "org/name@abc"


def test_a_folder_without_weights_is_not_the_same_as_any_other(tmp_path: Path):
    first, second = copy_of("blip", tmp_path), copy_of("sam", tmp_path)
    for folder in (first, second):
        (folder / "model.safetensors").unlink()
    identities = {model_identity(ModelSettings(model=str(f))).partition("@")[2] for f in (first, second)}
    assert len(identities) == 2


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
            load_original_checkpoint(settings, model)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "not a readable checkpoint" in refused()
    file.write_bytes(b"junk")
    assert "not a readable checkpoint" in refused()
    torch.save({"model": Innocent()}, file)
    assert "not a readable checkpoint" in refused() and not Path("ran").exists()
    torch.save({"model": {}}, file)
    assert "missing: 2 (such as bias)" in refused()
    torch.save(torch.nn.Linear(2, 4).state_dict(), file)
    assert "another size" in refused()
    torch.save({"model": {"module.weight": torch.ones(3, 2), "module.bias": torch.zeros(3), "other": 1}}, file)
    assert "not the model's: 1 (such as other)" in refused()
    load_original_checkpoint(settings, model, may_hold="other")
    assert model.weight.sum() == 6


def test_originals_are_refused_before_the_run_when_a_file_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "there.pth").touch()
    there, absent = str(tmp_path / "there.pth"), str(tmp_path / "absent.pth")
    with pytest.raises(BackendError, match=r"^segment.model .*no such .pth file"):
        SegmentSettings(backend="segment_anything", model=absent).check()
    SegmentSettings(backend="segment_anything", model=there).check()
    with pytest.raises(BackendError, match=r"^segment.model .*set segment.backend"):
        SegmentSettings(model=there).check()
    with pytest.raises(BackendError, match=r"^ground.model .*no such .pth file"):
        GroundSettings(backend="groundingdino", model=absent).check()
    with pytest.raises(BackendError, match=r"^ground.text_encoder bert-base-uncased: not in the cache"):
        GroundSettings(backend="groundingdino", model=there).check()
    with pytest.raises(BackendError, match=r"^ground.text_encoder ./bert: no such folder"):
        GroundSettings(backend="groundingdino", model=there, text_encoder="./bert").check()


def test_an_original_that_cannot_be_built_is_named(tmp_path):
    with pytest.raises(BackendError, match="not a readable checkpoint"):
        OriginalSam(ModelSettings(model=str(tmp_path / "none.pth")), "vit_b")
    with pytest.raises(BackendError, match=r"ground\.text_encoder"):
        OriginalGroundingDino(ModelSettings(model="none.pth"), ASKING, str(tmp_path), "swint_ogc")


def test_groundingdino_py_is_not_asked_for_half_precision():
    with pytest.raises(ValueError, match="float32 only"):
        GroundSettings(backend="groundingdino", dtype="bfloat16")


def test_the_toy_clip_loads_as_the_hubs_do():
    folder = PROJECT / "toyworld/weights/clip"
    processor = CLIPProcessor.from_pretrained(folder)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    inputs = processor(text=["a red mug"], return_tensors="pt")
    assert inputs["input_ids"].max() < model.config.text_config.vocab_size


class Malicious:
    """Makes a folder where it was unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_that_would_run_code_is_refused_unread(tmp_path: Path, wrapped: bool) -> None:
    path = tmp_path / "model.pth"
    malicious = Malicious(tmp_path / "run")
    torch.save({"model": {"weight": torch.zeros(1), "x": malicious}} if wrapped else malicious, path)
    with pytest.raises(BackendError, match="only tensors"):
        load_original_checkpoint(ModelSettings(model=str(path)), torch.nn.Linear(1, 1))
    assert not (tmp_path / "run").exists()
