"""Base and image encoder may be in a bucket or on the hub; a node fetches them once, and only what is loaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from datapipe.shards import Store
from subject_diffusion import node_copy
from subject_diffusion.errors import BackendError, RunError
from subject_diffusion.storage import file_system
from tests.backends.hub_server import Hub, Repository
from tests.backends.test_hub import set_endpoint
from tests.train.datasets import write_dataset
from tests.train.training import training_recipe
from train.trainer.loop import Trainer
from train.trainer.model_folder import check_model, loaded_files, model_folder
from train.trainer.pipeline import recipe_of

COMMIT = "1" * 40


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(node_copy, "COPIES", tmp_path / "copies")
    return tmp_path / "copies"


@pytest.fixture
def hub(sd1: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """As on the hub: beside the parts of a pipeline, the same weights in one file."""
    base = Path(shutil.copytree(sd1, tmp_path / "base"))
    (base / "v2-pruned.safetensors").write_bytes(b"the same again")
    repositories = {
        "toy/base": Repository({"main": COMMIT}, {COMMIT: base}),
        "toy/clip": Repository({"main": COMMIT}, {COMMIT: clip}),
        "toy/gated": Repository({"main": COMMIT}, {COMMIT: clip}, gated=True),
    }
    with Hub(repositories).served() as serving:
        set_endpoint(monkeypatch, serving.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield serving


def upload(folder: Path, url: str) -> str:
    store = Store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return url


def test_a_run_starts_from_models_of_a_bucket_and_of_the_hub(sd1, clip, bucket, hub, copies, tmp_path):
    base = upload(sd1, f"{bucket}/models/base")
    recipe = training_recipe(sd1, clip, write_dataset(tmp_path / "dataset", (6,)), base=base, image_encoder="toy/clip")
    there = Trainer(recipe, tmp_path / "run", torch.device("cpu"))
    here = recipe.model_copy(update={"base": str(sd1), "image_encoder": str(clip)})
    assert there.frozen == Trainer(here, tmp_path / "same", torch.device("cpu")).frozen
    (fetched,) = (path for path in copies.iterdir() if path.is_dir())
    state = fetched.stat().st_mtime_ns
    assert model_folder("base", base) == fetched and fetched.stat().st_mtime_ns == state, "only once"


def test_a_base_on_a_network_file_system_is_copied_with_the_folders_that_it_links_to(
    sd1, copies, monkeypatch, tmp_path
):
    base = Path(shutil.copytree(sd1, tmp_path / "shared disk/base"))
    shutil.move(base / "unet", tmp_path / "shared disk/unet")
    (base / "unet").symlink_to(tmp_path / "shared disk/unet")
    (tmp_path / "mounts").write_text(f"server:/x {tmp_path}/shared\\040disk nfs4 rw 0 0\n")
    monkeypatch.setattr(node_copy, "MOUNTS", tmp_path / "mounts")
    copy = model_folder("base", str(base))
    assert copy.parent == copies
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} == set(
        loaded_files([path.relative_to(sd1).as_posix() for path in sd1.rglob("*") if path.is_file()])
    )


def test_a_file_that_would_leave_the_copys_folder_is_refused(copies):
    files, root = file_system("memory://hostile/model", RunError)  # the client of S3 does not write such names
    files.pipe({f"{root}/{name}": b"{}" for name in ("model_index.json", "../../config.json")})
    with pytest.raises(RunError, match="would lie outside"):
        model_folder("base", "memory://hostile/model")
    assert not list(copies.rglob("*.json"))


def test_only_what_is_loaded_is_fetched_from_the_hub(hub, sd1):
    folder = model_folder("base", "toy/base")
    assert not (folder / "v2-pruned.safetensors").exists()
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert model_folder("base", str(sd1)) == sd1


def test_a_pipeline_of_the_hub_says_what_it_was_trained_by(hub, sd1, clip, tmp_path):
    recipe = training_recipe(sd1, clip, tmp_path / "data")
    (tmp_path / "base/recipe.json").write_text(recipe.model_dump_json())
    assert recipe_of(Path("toy/base")) == recipe


def test_half_precision_is_left_out_where_there_is_full_and_kept_where_it_is_alone():
    pipeline = ["model_index.json", "recipe.json", "README.json", "unet/model.safetensors"]
    assert loaded_files(pipeline) == [pipeline[0], pipeline[1], pipeline[3]]
    both = ["model_index.json", "unet/model.safetensors", "unet/model.fp16.safetensors", "vae/model.fp16.safetensors"]
    assert loaded_files(both) == [both[0], both[1], both[3]]
    assert loaded_files(["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.json"]) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nowhere", "base nowhere: no such folder; download the model there"),
        ("toy/nothing", "base toy/nothing: no such folder, and on the hub: .*has no model of this name"),
        ("s3://bucket/nothing", "s3://bucket/nothing: no such folder"),
    ],
)
def test_what_is_nowhere_is_one_line(hub, bucket, where, said):
    with pytest.raises(RunError, match=said) as error:
        check_model("base", where)
    assert "\n" not in str(error.value)


def test_a_gated_model_says_what_to_do(hub):
    with pytest.raises(BackendError, match=re.escape("base toy/gated: gated: accept its license at")):
        model_folder("base", "toy/gated")
