"""A run learns from images of several shapes, each step from one, and goes on exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from subject_diffusion.errors import RecipeError, RunError
from subject_diffusion.settings import validated
from tests.train.datasets import digest, joined
from tests.train.training import logged, recipe_tree, training_recipe
from train.trainer.launch import train
from train.trainer.loop import Trainer
from train.trainer.recipe import TrainRecipe

BUCKETS = {"buckets": {"sizes_px": [64], "step_px": 16}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bucketed(sd1, clip, dataset, tmp_path_factory) -> tuple[TrainRecipe, Path]:
    recipe = training_recipe(sd1, clip, dataset, examples=BUCKETS, optimizer={"steps": 3}, validation={"images": 1})
    out = tmp_path_factory.mktemp("bucketed") / "run"
    assert train(recipe, out)
    assert len(logged(out)) == 3
    return recipe, out


def test_each_step_is_of_one_shape_and_both_shapes_come(bucketed, tmp_path):
    trainer = Trainer(bucketed[0], tmp_path / "run", CPU)
    assert trainer.news == ["images are cut to height x width (images of an epoch): 64 x 64 (8), 48 x 80 (10)"]
    batches = list(trainer.loader)
    shapes = [tuple(batch["image"].shape[2:]) for batch in batches]
    assert shapes[::2] == shapes[1::2] and set(shapes) == {(64, 64), (48, 80)}
    assert all(
        tuple(8 * side for side in b["noise"].shape[3:]) == shape for b, shape in zip(batches, shapes, strict=True)
    )


def test_it_goes_on_at_the_exact_sample_in_micro_batches_of_any_size(bucketed, tmp_path):
    recipe, undisturbed = bucketed
    expected = [dict(batch) for batch in Trainer(recipe, tmp_path / "fresh", CPU).loader][4:]
    out = Path(shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("step-*3", "pipeline")))
    run = recipe.run.model_copy(update={"micro_batch": 4})
    resumed = Trainer(recipe.model_copy(update={"run": run}), out, CPU)
    assert resumed.step == 2
    pairs = zip(expected[::2], expected[1::2], strict=True)
    assert [digest(dict(batch)) for batch in resumed.loader] == [digest(joined(pair)) for pair in pairs]


def test_another_batch_size_begins_a_new_epoch_and_other_buckets_are_refused(bucketed, sd1, clip, dataset):
    _, out = bucketed
    larger = training_recipe(sd1, clip, dataset, examples=BUCKETS, optimizer={"batch_size": 6})
    trainer = Trainer(larger, out, CPU)
    assert "from step 3 on, samples come in another order: a new epoch begins" in trainer.news
    for examples in ({}, {"buckets": {"sizes_px": [64], "step_px": 32}}):
        with pytest.raises(RunError, match=r"holds a run with another examples\.buckets"):
            train(training_recipe(sd1, clip, dataset, examples=examples), out)


def test_sides_that_the_autoencoder_cannot_take_are_one_line(sd1, clip, dataset, tmp_path):
    recipe = training_recipe(sd1, clip, dataset, examples={"buckets": {"sizes_px": [60], "step_px": 12}})
    with pytest.raises(RunError, match=r"examples\.buckets\.step_px 12: the base's autoencoder takes multiples of 8"):
        Trainer(recipe, tmp_path / "run", CPU)
    with pytest.raises(RecipeError, match=r"examples.buckets: sizes_px 60 is no multiple of step_px 64"):
        validated(TrainRecipe, recipe_tree(sd1, clip, dataset), ["examples.buckets.sizes_px=[60]"], "recipe")
