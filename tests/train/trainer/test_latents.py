"""Latents computed beforehand are those that training would compute, and those of anything else are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from datapipe.shards import Store
from datapipe.shards.verify import verify
from subject_diffusion.errors import RecipeError, RunError, ShardError
from subject_diffusion.settings import validated
from tests.train.training import recipe_tree, training_recipe
from train.trainer.encode import encode
from train.trainer.latent_run import cache_latents
from train.trainer.loop import Trainer
from train.trainer.recipe import TrainRecipe

CPU = torch.device("cpu")
EXAMPLES = {"crops": 3, "buckets": {"sizes_px": [64], "step_px": 16}}


@pytest.fixture(scope="module")
def written(sd1, clip, dataset, tmp_path_factory) -> tuple[TrainRecipe, Path]:
    """A recipe whose latents are there, and the folder of its dataset."""
    folder = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("cached") / "dataset"))
    recipe = training_recipe(sd1, clip, folder, examples=EXAMPLES, run={"cached_latents": True})
    assert cache_latents(recipe) == 3
    return recipe, folder


def latent_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("latents-*/*"))}


def encoded(recipe: TrainRecipe, out: Path, monkeypatch: Any = None) -> list[Any]:
    trainer = Trainer(recipe, out, CPU)
    if monkeypatch is not None:
        monkeypatch.setattr(AutoencoderKL, "encode", None)
    return [encode(trainer.model, batch, CPU, 0.1) for batch in trainer.loader]


def test_training_reads_what_it_would_compute_and_leaves_the_encoder_alone(written, tmp_path, monkeypatch):
    recipe, _ = written
    plain = recipe.model_copy(update={"run": recipe.run.model_copy(update={"cached_latents": False})})
    expected = encoded(plain, tmp_path / "plain")
    found = encoded(recipe, tmp_path / "cached", monkeypatch)
    assert len(found) == len(expected) > 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.latents, other.latents, rtol=2e-3, atol=2e-3)
        for name in ("noise", "timesteps", "boxes", "masks", "classes"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_only_what_is_missing_is_computed_and_comes_out_the_same(written, sdd, tmp_path):
    recipe, folder = written
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
    before = latent_files(folder)
    assert cache_latents(recipe) == 0
    next(folder.glob("latents-*/shard-000001-*")).unlink()
    code, said, _ = sdd("cache", "--recipe", tmp_path / "recipe.yaml")
    assert code == 0 and "latents of 1 shard(s) computed" in said
    assert latent_files(folder) == before
    assert not list(verify(Store(str(folder))))


@pytest.mark.parametrize("change", ["vae", "crops", "filter"])
def test_latents_of_anything_else_are_refused_in_one_line(written, tmp_path, sd1, clip, change):
    tree = written[0].model_dump()
    if change == "vae":
        base = Path(shutil.copytree(sd1, tmp_path / "sd1"))
        vae = AutoencoderKL.from_pretrained(base / "vae")
        torch.nn.init.constant_(vae.encoder.conv_in.weight, 0.1)
        vae.save_pretrained(base / "vae")
        tree["base"] = str(base)
    elif change == "crops":
        tree["examples"]["crops"] = 2
    else:
        tree["sources"][0]["keep"]["min_score"] = 0.75
    with pytest.raises(RunError, match=r"of 3 of 3 shards are missing \(latents-\w+ is of another VAE") as said:
        Trainer(TrainRecipe.model_validate(tree), tmp_path / "run", CPU)
    assert "\n" not in str(said.value) and "`sdd cache`" in str(said.value)


def test_a_damaged_file_is_named(written, tmp_path):
    recipe, folder = written
    other = Path(shutil.copytree(folder, tmp_path / "dataset"))
    for path in other.glob("latents-*/*"):
        path.write_bytes(path.read_bytes()[:100])
    sources = (recipe.sources[0].__class__(str(other)),)
    with pytest.raises(ShardError, match=r"shard-00000\d-\w+\.safetensors: no latents, or not those of its shard"):
        next(iter(Trainer(recipe.model_copy(update={"sources": sources}), tmp_path / "run", CPU).loader))


def test_without_crops_there_is_nothing_to_compute_beforehand(refused, sd1, clip, dataset, tmp_path):
    with pytest.raises(RecipeError, match=r"run.cached_latents: say with examples.crops in how many ways"):
        validated(TrainRecipe, recipe_tree(sd1, clip, dataset), ["run.cached_latents=true"], "recipe")
    assert "examples.crops" in refused("cache", "--recipe", "train-toy", "--data", str(dataset))
