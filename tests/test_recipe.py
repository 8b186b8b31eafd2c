"""A recipe says what it means, or is refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import yaml

from datapipe.recipe import Recipe, load_recipe, recipe_of_run
from datapipe.schema import StageName
from datapipe.stages import ANNOTATE_STAGES, FETCH_STAGES, STAGES
from subject_diffusion.errors import RecipeError
from subject_diffusion.settings import EXECUTION_ONLY, Settings, describe, load_settings
from toyworld.recipe import ToyRecipe
from toyworld.render import NOUNS
from train.stream.filter import Filter
from train.trainer.recipe import TrainRecipe

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
    load_settings(TrainRecipe if path.name in TRAINING else ToyRecipe, path)


def test_sets_are_written_in_order():
    assert Filter(tags=frozenset(NOUNS)).model_dump(mode="json")["tags"] == sorted(NOUNS)


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
    assert (select.box_threshold, select.nms_iou) == (0.25, 0.5)
    assert (select.min_boxes, select.max_boxes, select.min_score) == (2, 8, 0.3)
    assert (select.min_area, select.max_area, select.min_aspect, select.max_aspect) == (0.08, 0.7, 0.3, 3)
    assert (select.min_mask_fill, select.max_containment) == (0.6, 0.8)


def test_the_papers_recipe_follows_the_released_code_and_the_modern_one_does_not():
    paper, modern = (load_recipe(RECIPES / f"{name}.yaml").identity() for name in ("sdd", "modern"))
    rules = {
        "screen.short_side_px": (800, None),
        "screen.max_side_px": (3000, None),
        "screen.exact_duplicates": (False, True),
        "screen.near_duplicate_bits": (None, 4),
        "tag.compounds": (False, True),
        "ground.separator": ("comma", "period"),
        "ground.pad_multiple": (1, 1),
        "select.score": ("paper", "phrase"),
        "select.text_threshold": (0, 0.2),
        "select.count_boxes": ("before_nms", "after_nms"),
        "select.number_words": (True, False),
        "select.score_digits": (2, None),
        "select.max_rival_score": (0.2, None),
        "select.max_masks_in_box": (4, None),
        "select.max_mask_area": (1, 1),
    }
    assert {key: (paper[key], modern[key]) for key in rules} == rules
    assert not {key for key in paper if paper[key] != modern[key]} - rules.keys() - {
        "screen.min_short_side_px", "screen.min_aspect", "screen.max_aspect", "caption.max_new_tokens",
        *(f"{stage}.{key}" for stage in ("caption", "ground", "segment") for key in ("model", "revision")),
    }  # fmt: skip
    defaults = Recipe().identity()
    assert {
        key for key in modern if key.startswith(("screen.", "tag.", "select.")) and modern[key] != defaults.get(key)
    } == {"screen.strip_metadata"}


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
        ("caption: {micro_batch: 0}", "caption.micro_batch = 0: input should be greater than or equal to 1, or input "),
        ("caption: {micro_batch: many}", "caption.micro_batch = 'many': "),
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
    for bad in ("select.min_score", "slice_rows.x=1", "tag.nouns=[mug"):
        with pytest.raises(RecipeError, match="--set"):
            load_recipe(RECIPES / "toy.yaml", [bad])


def test_what_only_places_the_work_does_not_change_what_a_recipe_is():
    plain = load_recipe(RECIPES / "toy.yaml")
    placed = load_recipe(
        RECIPES / "toy.yaml", ["run.fetch_workers=7", "caption.micro_batch=1", "ground.device=cpu", "fetch.threads=3"]
    )
    other = load_recipe(RECIPES / "toy.yaml", ["ground.floor=0.3"])
    assert plain.hash() == placed.hash() != other.hash()


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("sdd.yaml", "5e31b4ac82074e3b69ece7c8cf950a5e616fe0adc9340b7387d61a7beda6e3c6"),
        ("toy.yaml", "30a5908deb2d25229d4e0b8ad1205236ba6ce970e02f5e58766072f2c182472e"),
    ],
)
def test_a_recipe_is_what_it_was_when_folders_were_filled_with_it(name, digest):
    assert load_settings(ToyRecipe, RECIPES / name).hash() == digest


def test_a_recipe_that_reads_no_toy_web_is_the_same_with_the_toy_world_and_without():
    path = RECIPES / "sdd.yaml"
    assert load_recipe(path).identity() == load_settings(ToyRecipe, path).identity()


def test_the_record_of_a_run_with_a_blocklist_is_read_where_the_list_is_not(tmp_path):
    listed = tmp_path / "hashes.txt"
    listed.write_text("0" * 64)
    recipe = load_recipe(RECIPES / "toy.yaml", [f"screen.hash_blocklist=[{listed}]"])
    identity = recipe.identity()
    digest = recipe.hash()
    listed.unlink()
    assert recipe_of_run(identity).hash() == digest


def test_what_is_execution_only_is_marked_on_the_field_and_not_known_by_its_name():
    class Inner(Settings):
        threads: int = 3
        """Length of a rope: it decides."""
        workers: Annotated[int, EXECUTION_ONLY] = 4
        """Execution only."""

    class Outer(Settings):
        inner: Inner = Inner()
        placed: Annotated[Inner, EXECUTION_ONLY] = Inner()

    assert Outer().identity() == {"inner.threads": 3}


def test_the_one_list_of_stages_is_that_of_the_verdicts():
    optional = (StageName.NSFW, StageName.WATERMARK, StageName.DESCRIBE, StageName.CUSTOM)
    assert list(STAGES) == [name for name in StageName if name not in optional]
    assert FETCH_STAGES + ANNOTATE_STAGES == STAGES


def test_every_key_is_explained():
    for key, _, default, meaning in [*describe(ToyRecipe), *describe(TrainRecipe)]:
        assert meaning.endswith((".", ")")) or "." in meaning, key
        assert default, key


def test_the_reference_of_keys_is_up_to_date():
    printed = subprocess.run(
        [sys.executable, "-m", "sdd", "recipe", "--markdown"], capture_output=True, text=True, check=True
    ).stdout
    reference = (RECIPES / "README.md").read_text()
    assert reference.startswith(printed)
    for key in re.findall(r"`((?:screen|caption|tag|ground|select)\.\w+)", reference[len(printed) :]):
        assert f"| {key} |" in printed


def test_the_toy_recipe_is_written_in_the_order_of_the_datas_way():
    keys = [k for k in yaml.safe_load((RECIPES / "toy.yaml").read_text()) if k not in ("toyworld", "slice_rows")]
    assert keys == ["fetch", "screen", "caption", "tag", "ground", "segment", "select", "run"]


def test_an_error_of_the_whole_recipe_has_no_stray_colon():
    with pytest.raises(RecipeError) as refused:
        load_settings(TrainRecipe, "train-toy", ["optimizer.batch_size=7"])
    assert str(refused.value).startswith("recipe train-toy: optimizer.batch_size 7 is no multiple")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("url_col", "source.url_column"), ("source.caption_col", "source.alt_text_column"), ("url_list", "source.path")],
)
def test_a_key_by_img2datasets_name_is_told_its_name_here(theirs, ours):
    with pytest.raises(RecipeError, match=f"unknown key {theirs}; did you mean {ours}?"):
        load_recipe("sdd", [f"{theirs}=x"])
