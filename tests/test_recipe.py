"""A recipe says what it means, or is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from datapipe.errors import RecipeError
from datapipe.recipe import Recipe, load_recipe
from datapipe.settings import describe, load_settings
from toyworld.render import NOUNS
from train.recipe import TrainRecipe

RECIPES = Path(__file__).parents[1] / "manifests/recipes"


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    message = str(refused.value)
    assert "\n" not in message
    return message


TRAINING = {"subject-diffusion.yaml", "train-toy.yaml"}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.name)
def test_the_recipes_that_come_along_are_valid(path):
    load_settings(TrainRecipe if path.name in TRAINING else Recipe, path)


def test_the_papers_recipe_has_the_papers_constants():
    recipe = load_recipe(RECIPES / "sdd.yaml")
    select = recipe.select
    assert (recipe.screen.min_long_side_px, recipe.screen.max_white_fraction, recipe.screen.white_level) == (
        600,
        0.1,
        0.9,
    )
    assert (recipe.tag.backend, recipe.tag.min_tags, recipe.tag.max_tags) == ("spacy", 3, 8)
    assert (recipe.ground.short_side, recipe.ground.long_side) == (800, 3000)
    assert (select.box_threshold, select.text_threshold, select.nms_iou) == (0.25, 0.2, 0.5)
    assert (select.min_boxes, select.max_boxes, select.min_score) == (2, 8, 0.3)
    assert (select.min_area, select.max_area, select.min_aspect, select.max_aspect) == (0.08, 0.7, 0.3, 3)
    assert (select.min_mask_fill, select.max_containment) == (0.6, 0.8)


def test_the_toy_recipe_knows_every_toy_noun():
    assert load_recipe(RECIPES / "toy.yaml").tag.nouns == NOUNS


def test_an_unknown_key_is_answered_with_the_nearest_known_one(tmp_path):
    assert "did you mean ground.short_side?" in refusal(tmp_path, "ground: {short_sied: 800}")
    assert "did you mean select?" in refusal(tmp_path, "selekt: {}")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("select: {nms_iou: 1.5}", "select.nms_iou = 1.5"),
        ("slice_rows: none", "slice_rows = 'none'"),
        ("select: {min_score: .nan}", "select.min_score"),
        ("caption: {backend: magic}", "caption.backend = 'magic'"),
        ("run: {pools: [{stages: [caption, tag]}]}", "each of caption, tag, ground, segment, select once"),
        ("- a list", "expected keys and values"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_a_bad_value_is_named_with_where_it_stands(tmp_path, text, named):
    assert named in refusal(tmp_path, text)


def test_overrides_are_values_in_yaml(tmp_path):
    recipe = load_recipe(RECIPES / "toy.yaml", ["select.min_score=0.4", "tag.nouns=[mug]"])
    assert (recipe.select.min_score, recipe.tag.nouns) == (0.4, ("mug",))
    for bad in ("select.min_score", "slice_rows.x=1"):
        with pytest.raises(RecipeError, match="--set"):
            load_recipe(RECIPES / "toy.yaml", [bad])


def test_what_only_places_the_work_does_not_change_what_a_recipe_is():
    plain = load_recipe(RECIPES / "toy.yaml")
    placed = load_recipe(
        RECIPES / "toy.yaml", ["run.fetch_workers=7", "caption.micro_batch=1", "ground.device=cpu", "fetch.threads=3"]
    )
    other = load_recipe(RECIPES / "toy.yaml", ["ground.floor=0.3"])
    assert plain.hash() == placed.hash() != other.hash()


def test_every_key_is_explained():
    for key, _, default, meaning in [*describe(Recipe), *describe(TrainRecipe)]:
        assert meaning.endswith((".", ")")) or "." in meaning, key
        assert default, key


def test_the_reference_of_keys_is_up_to_date():
    printed = subprocess.run(
        [sys.executable, "-m", "sdd", "recipe", "--markdown"], capture_output=True, text=True, check=True
    ).stdout
    assert printed == (RECIPES / "README.md").read_text()


def test_the_toy_recipe_is_written_in_the_order_of_the_datas_way():
    keys = [k for k in yaml.safe_load((RECIPES / "toy.yaml").read_text()) if k not in ("toyworld", "slice_rows")]
    assert keys == ["fetch", "screen", "caption", "tag", "ground", "segment", "select", "run"]
