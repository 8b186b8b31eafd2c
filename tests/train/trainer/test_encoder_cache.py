"""What is encoded beforehand is what training would encode, and that of anything else is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPVisionModelWithProjection

from datapipe.schema import IDENTITIES, RLE, Slice
from datapipe.shards import Store, write_shard
from datapipe.shards.verify import verify
from model import TrainingBatch
from subject_diffusion.errors import RecipeError, RunError, ShardError
from subject_diffusion.settings import validated
from tests.train.datasets import PROVENANCE, digest, joined, sample, write_dataset
from tests.train.trainer.test_identities import parquet, table
from tests.train.training import logged, recipe_tree, training_recipe
from train.trainer.encode import encode
from train.trainer.encoder_cache_run import fill_caches
from train.trainer.launch import train
from train.trainer.loop import Trainer
from train.trainer.recipe import TrainRecipe

CPU = torch.device("cpu")
EXAMPLES = {"crops": 3, "buckets": {"sizes_px": [64], "step_px": 16}, "reference": {"draws": 2}}
CACHED = {"cached_latents": True, "cached_references": True}
PAIRED = ((0, 0, "mug"), (8, 1, "mug"), (14, 2, "mug"), (1, 1, "fish"), (19, 0, "fish"))


@pytest.fixture(scope="module")
def written(sd1, clip, dataset, tmp_path_factory) -> tuple[TrainRecipe, Path]:
    """A recipe whose caches are there, and the folder of its dataset, which shows two subjects several times."""
    folder = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("cached") / "dataset"))
    (folder / IDENTITIES).write_bytes(parquet(table(*PAIRED)))
    recipe = training_recipe(
        sd1, clip, folder, examples=EXAMPLES, run=CACHED, optimizer={"steps": 2}, validation={"images": 1}
    )
    assert fill_caches(recipe) == {"latents": 3, "references": 3}
    return recipe, folder


def cache_files(folder: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(folder.glob("*-*/*.safetensors"))}


def without_caches(recipe: TrainRecipe) -> TrainRecipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update=dict.fromkeys(CACHED, False))})


def encoded(recipe: TrainRecipe, cache: Path) -> list[TrainingBatch]:
    """An epoch, as the trainer encodes it. cache: of downloads."""
    trainer = Trainer(recipe, cache / "no-run", CPU, cache)
    return [encode(trainer.model, batch, CPU, 0.1) for batch in trainer.loader]


def check_alike(found: list[TrainingBatch], expected: list[TrainingBatch]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        there = other.present
        torch.testing.assert_close(one.latents, other.latents, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(one.classes[there], other.classes[there], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(one.patches[there], other.patches[there], rtol=2e-3, atol=2e-3)
        for name in ("noise", "timesteps", "boxes", "masks", "present", "time_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_training_reads_what_it_would_compute_and_leaves_the_encoders_alone(written, tmp_path, monkeypatch):
    recipe, _ = written
    expected = encoded(without_caches(recipe), tmp_path)
    monkeypatch.setattr(AutoencoderKL, "encode", None)
    monkeypatch.setattr(CLIPVisionModelWithProjection, "forward", None)
    check_alike(encoded(recipe, tmp_path), expected)


def test_in_a_bucket_and_on_stable_diffusion_xl_it_is_the_same(bucket, sdxl, clip, tmp_path):
    write_dataset(f"{bucket}/cached", (2, 2))
    sources, model = [{"path": f"{bucket}/cached"}], {"attention_downsampling": [2, 4]}
    recipe = training_recipe(sdxl, clip, tmp_path, sources=sources, model=model, examples=EXAMPLES, run=CACHED)
    assert fill_caches(recipe, cache=tmp_path) == {"latents": 2, "references": 2}
    check_alike(encoded(recipe, tmp_path), encoded(without_caches(recipe), tmp_path))


def test_a_run_takes_the_steps_of_one_without_and_goes_on_at_the_exact_sample(written, tmp_path):
    recipe, _ = written
    out = tmp_path / "cached"
    assert train(without_caches(recipe), tmp_path / "plain") and train(recipe, out)
    assert logged(out) == pytest.approx(logged(tmp_path / "plain"), rel=5e-3)
    expected = [dict(batch) for batch in Trainer(recipe, tmp_path / "fresh", CPU).loader][4:]
    run = recipe.run.model_copy(update={"micro_batch": 4})
    resumed = Trainer(recipe.model_copy(update={"run": run}), out, CPU)
    assert resumed.step == 2
    pairs = zip(expected[::2], expected[1::2], strict=True)
    assert [digest(dict(batch)) for batch in resumed.loader] == [digest(joined(pair)) for pair in pairs]


def test_only_what_is_missing_is_computed_and_comes_out_the_same(written, sdd, tmp_path):
    recipe, folder = written
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
    before = cache_files(folder)
    assert len(before) == 6 and fill_caches(recipe) == {"latents": 0, "references": 0}
    for kind in ("latents", "references"):
        next(folder.glob(f"{kind}-*/shard-000001-*")).unlink()
    code, said, _ = sdd("cache", "--recipe", tmp_path / "recipe.yaml")
    assert code == 0 and "latents of 1 shard(s)" in said and "references of 1 shard(s)" in said
    assert cache_files(folder) == before
    assert not list(verify(Store(str(folder))))
    latents, references = (load_file(next(folder.glob(f"{n}-*/shard-000001-*"))) for n in ("latents", "references"))
    assert latents["0000000008"].shape == (3, 2, 4, 6, 10)
    assert references["0000000008/2/patches"].shape == (2, 16, 16)


def changed(tree: dict[str, Any], change: str, folder: Path) -> None:
    if change == "vae":
        tree["base"] = str(shutil.copytree(tree["base"], folder / "sd1"))
        vae = AutoencoderKL.from_pretrained(folder / "sd1" / "vae")
        torch.nn.init.constant_(vae.encoder.conv_in.weight, 0.1)
        vae.save_pretrained(folder / "sd1" / "vae")
    elif change == "image encoder":
        tree["image_encoder"] = str(shutil.copytree(tree["image_encoder"], folder / "clip"))
        clip = CLIPModel.from_pretrained(folder / "clip")
        torch.nn.init.constant_(clip.visual_projection.weight, 0.1)
        clip.save_pretrained(folder / "clip")
    elif change == "crops":
        tree["examples"]["crops"] = 2
    elif change == "draws":
        tree["examples"]["reference"]["draws"] = 1
    elif change == "augmentation":
        tree["examples"]["reference"]["flip"] = 0.0
    else:
        tree["sources"][0]["keep"]["min_score"] = 0.75


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("latents", change) for change in ("vae", "crops", "filter")),
        *(("references", change) for change in ("image encoder", "draws", "augmentation")),
    ],
)
def test_a_cache_of_anything_else_is_refused_in_one_line(written, tmp_path, kind, change):
    tree = written[0].model_dump()
    changed(tree, change, tmp_path)
    stale = rf"{kind} of 3 of 3 shards are missing \({kind}-\w+ is of another"
    with pytest.raises(RunError, match=stale) as said:
        Trainer(TrainRecipe.model_validate(tree), tmp_path / "run", CPU)
    assert "\n" not in str(said.value) and "`sdd cache`" in str(said.value)


def test_where_subjects_come_again_a_filter_of_what_is_learned_keeps_the_references(written, tmp_path):
    tree = written[0].model_dump()
    tree["sources"][0]["keep"]["min_score"] = 0.85
    tree["run"]["cached_latents"] = False
    recipe = TrainRecipe.model_validate(tree)
    check_alike(encoded(recipe, tmp_path), encoded(without_caches(recipe), tmp_path))


@pytest.mark.parametrize("kind", ["latents", "references"])
def test_a_damaged_file_is_named(written, tmp_path, kind):
    recipe, folder = written
    other = Path(shutil.copytree(folder, tmp_path / "dataset"))
    for number, path in enumerate(other.glob(f"{kind}-*/*")):
        content = path.read_bytes()
        path.write_bytes(content[:100] if number else content.replace(b"/patches", b"/catches"))
    sources = (recipe.sources[0].__class__(str(other)),)
    trainer = Trainer(recipe.model_copy(update={"sources": sources}), tmp_path / "run", CPU)
    with pytest.raises(ShardError, match=rf"{kind}-\w+/shard-00000\d-\w+\.safetensors: damaged, or not of its shard"):
        list(trainer.loader)


def test_a_corrupt_subject_is_replaced_as_without_the_cache(tmp_path, sd1, clip):
    rows = [sample(row) for row in range(6)]
    rows[1] = rows[1].replace(candidates=(dataclasses.replace(rows[1].candidates[0], mask=RLE((1, 1), "")),))
    folder = tmp_path / "dataset"
    write_shard(Store(str(folder)), "shard", Slice(0, tuple(rows)), PROVENANCE)
    (folder / IDENTITIES).write_bytes(parquet(table((0, 0, "mug"), (1, 0, "mug"))))
    run = {"cached_references": True}
    recipe = training_recipe(sd1, clip, folder, examples={"reference": {"draws": 2}}, run=run)
    assert fill_caches(recipe) == {"references": 1}
    loaders = [Trainer(r, tmp_path / "run", CPU).loader for r in (recipe, without_caches(recipe))]
    keys = [[key for batch in loader for key in batch["key"]] for loader in loaders]
    assert keys[0] == keys[1]
    assert loaders[0].replaced == loaders[1].replaced
    assert {one.key for one in loaders[0].replaced} == {"0000000000", "0000000001"}


def test_without_draws_there_is_nothing_to_compute_beforehand(refused, sd1, clip, dataset, tmp_path):
    for cached, key in (("latents", "examples.crops"), ("references", "examples.reference.draws")):
        with pytest.raises(RecipeError, match=rf"run.cached_{cached}: say with {key} "):
            validated(TrainRecipe, recipe_tree(sd1, clip, dataset), [f"run.cached_{cached}=true"], "recipe")
        assert key in refused("cache", "--recipe", "train-toy", "--data", str(dataset))
