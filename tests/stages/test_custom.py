"""A stage of a user's own is named in the recipe by its import path, and everything else follows from its settings."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from datapipe.inspect import summarize
from datapipe.inspect.report import report_page
from datapipe.plan import read_run
from datapipe.recipe import Recipe, check_stages, load_recipe
from datapipe.schema import Outcome, Reason, Sample, StageName, from_table
from datapipe.shards import Store, iter_tables
from datapipe.stages import ANNOTATE_STAGES, FETCH_STAGES
from subject_diffusion.errors import RecipeError
from tests.documents import marked
from tests.toy import PROJECT, TOY_RECIPE, run, write_images, write_recipe

BLURRED = {"0001.jpg", "0006.jpg", "0013.jpg"}
CUSTOM = {"use": "sharpness:SharpnessSettings", "after": "caption"}
POOLS = [
    {"stages": ["caption", "tag"], "workers": 1, "cpus": 0.5},
    {"stages": ["ground", "segment", "select"], "workers": 1, "cpus": 0.5},
]


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's module, which is no part of this project."""
    folder = tmp_path_factory.mktemp("users_folder")
    shutil.copy(Path(__file__).with_name("sharpness.py"), folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 24)
    for name in BLURRED:
        image = Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB")
        image.filter(ImageFilter.GaussianBlur(6)).save(folder / name, quality=95)
    return folder


def run_custom(users_folder: Path, images: Path, out: Path, **custom: object) -> subprocess.CompletedProcess[str]:
    recipe = write_recipe(out.with_suffix(".yaml"), slice_rows=8, custom={**CUSTOM, **custom}, run={"pools": POOLS})
    path = os.pathsep.join((str(users_folder), str(PROJECT)))
    return run(recipe, images, out, env={**os.environ, "PYTHONPATH": path})


@pytest.fixture(scope="module")
def out(users_folder: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "sharp"
    done = run_custom(users_folder, images, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_its_verdicts_are_in_the_sidecars_and_in_the_funnel(out):
    samples = [s for t in iter_tables(Store(str(out))) for s in from_table(t)]
    dropped = [s for s in samples if s.verdict and s.verdict.stage is StageName.CUSTOM]
    assert {Path(s.url).name for s in dropped} == BLURRED
    for sample in dropped:
        assert sample.verdict and sample.verdict.reason is Reason.CUSTOM
        assert sample.verdict.detail.startswith("blurred: sharpness ")
        assert sample.caption and not sample.tags  # It ran where the recipe puts it.
    assert summarize(Store(str(out))).losses[StageName.CUSTOM, Reason.CUSTOM, Outcome.DROPPED] == len(BLURRED)
    assert "blurred: sharpness" in report_page(Store(str(out)))


def test_the_run_records_it_and_is_readable_without_its_code(out):
    record = read_run(Store(str(out)))
    own = {key: value for key, value in record.identity.items() if key.startswith("custom.")}
    assert own == {
        "custom.use": "sharpness:SharpnessSettings",
        "custom.after": "caption",
        "custom.settings.min_sharpness": 2.0,
    }
    throughput = json.loads((out / "throughput.jsonl").read_text().splitlines()[-1])
    assert list(throughput["stages"]) == ["caption", "custom", "tag", "ground", "segment", "select"]


def test_its_settings_count_except_those_that_only_change_execution(users_folder, images, out):
    again = run_custom(users_folder, images, out, settings={"micro_batch": 1})
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    other = run_custom(users_folder, images, out, settings={"min_sharpness": 3})
    assert other.returncode == 2
    assert "custom.settings.min_sharpness was 2.0 and is now 3.0" in other.stderr


@pytest.mark.parametrize(
    ("custom", "named"),
    [
        ({"after": "select"}, "no stage can follow select"),
        ({"use": "sharpness"}, "custom.use = 'sharpness'"),
        ({"use": "nowhere:Settings"}, "No module named 'nowhere'; its folder must be on PYTHONPATH"),
        ({"use": "sharpness:Nothing"}, "no attribute 'Nothing'"),
        ({"use": "sharpness:Sharpness"}, "is no StageSettings"),
        ({"settings": {"min_sharpnes": 3}}, "did you mean min_sharpness?"),
    ],
)
def test_what_cannot_be_used_is_named(users_folder, tmp_path, monkeypatch, custom, named):
    monkeypatch.syspath_prepend(users_folder)
    path = write_recipe(tmp_path / "recipe.yaml", custom={**CUSTOM, **custom})
    with pytest.raises(RecipeError) as refused:
        check_stages(load_recipe(path))
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_stage_that_gives_itself_another_stages_name_is_refused():
    custom = {"use": "datapipe.stages.tag:TagSettings", "after": "tag", "settings": {"backend": "rules"}}
    with pytest.raises(RecipeError, match=r"must be StageName\.CUSTOM"):
        Recipe.model_validate({"custom": custom}).stages()[StageName.CUSTOM].build()


def test_it_joins_the_phase_of_the_stage_that_it_follows():
    recipe = Recipe.model_validate({"custom": {**CUSTOM, "after": "screen"}})
    assert recipe.with_optional(FETCH_STAGES) == (*FETCH_STAGES, StageName.CUSTOM)
    assert recipe.with_optional(ANNOTATE_STAGES) == ANNOTATE_STAGES
    assert list(recipe.stages()) == [*FETCH_STAGES, StageName.CUSTOM, *ANNOTATE_STAGES]


def test_a_recipe_without_one_is_what_it_was():
    recipe = load_recipe(TOY_RECIPE)
    assert StageName.CUSTOM not in recipe.stages()
    assert not [key for key in recipe.identity() if key.startswith("custom")]


def test_it_runs_as_a_plain_object(users_folder, images, monkeypatch):
    monkeypatch.syspath_prepend(users_folder)
    stage = Recipe.model_validate({"custom": CUSTOM}).stages()[StageName.CUSTOM].build()
    sharp, blurred = (Sample(row=i, image=(images / f"{i:04d}.jpg").read_bytes()) for i in (0, 1))
    kept, dropped = stage([sharp, blurred])
    assert kept.verdict is None
    assert dropped.verdict and dropped.verdict.reason is Reason.CUSTOM


def test_the_example_in_the_docs_is_the_stage_that_is_tested_here() -> None:
    assert marked("stage").code.strip() in (PROJECT / "tests/stages/sharpness.py").read_text("utf-8")
