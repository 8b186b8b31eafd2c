"""What is wrong with a model ends the run before anything is fetched; what goes wrong for every row ends it as soon as
that shows; and always in one line."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from datapipe.isolation import run_stage
from datapipe.ledger import HOPELESS_AFTER, Ledger, Tally
from datapipe.probe import ask, probe_sample
from datapipe.recipe import load_recipe
from datapipe.schema import Reason, Sample, StageName
from datapipe.shards import Store, present
from datapipe.stages import ANNOTATE_STAGES
from subject_diffusion import Labeler
from subject_diffusion.errors import BackendError, RunError
from tests.toy import PROJECT, TOY_RECIPE, run, write_images, write_recipe

WEIGHTS = PROJECT / "toyworld/weights"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 12)
    return folder


def nothing_was_fetched(out: Path) -> bool:
    store = Store(str(out))
    return not present(store, "raw") and not store.exists("run.json")


def test_every_model_answers_on_the_test_image_and_its_time_is_taken():
    answers = ask(load_recipe(TOY_RECIPE, ["toyworld=null", "caption.micro_batch=auto"]), ANNOTATE_STAGES)
    assert list(answers) == list(ANNOTATE_STAGES)
    assert all(answer.took_s > 0 for answer in answers.values())
    if not torch.cuda.is_available():
        assert all(not answer.found for answer in answers.values()), "nothing is tried on a CPU"


def test_the_test_image_is_one_that_every_stage_could_have_left():
    sample = probe_sample()
    assert Image.open(io.BytesIO(sample.image or b"")).size == (sample.width, sample.height)
    for tag in sample.tags:
        assert sample.caption[slice(*tag.span)] == tag.text


def test_a_model_whose_output_is_no_number_is_found_by_the_test_image(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(WEIGHTS / "sam", tmp_path / "sam")
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors")
    recipe = load_recipe(TOY_RECIPE, ["toyworld=null", f"segment.model={folder}"])
    with pytest.raises(BackendError, match="segment: its model cannot answer on a test image: FloatingPointError"):
        ask(recipe, [StageName.SEGMENT])


def test_what_only_a_worker_can_find_is_one_line_before_anything_is_fetched(images, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(WEIGHTS / "sam", tmp_path / "sam")
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(tensors)[::3]:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    recipe = write_recipe(tmp_path / "recipe.yaml", segment={"model": str(folder)})
    done = run(recipe, images, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    (line,) = [said for said in done.stderr.splitlines() if not said.startswith("[")]
    assert line.startswith(
        f"sdd: segment.model {folder}: its tensors are not those of the model; missing: 72 (such as "
    )
    assert nothing_was_fetched(tmp_path / "out")


def test_a_folder_that_is_not_whole_is_one_line_before_ray_starts(images, tmp_path):
    folder = shutil.copytree(WEIGHTS / "grounding-dino", tmp_path / "grounding-dino")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    recipe = write_recipe(tmp_path / "recipe.yaml", ground={"model": str(folder)})
    done = run(recipe, images, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"ground.model {folder}: model.safetensors is a git-LFS pointer" in done.stderr
    assert nothing_was_fetched(tmp_path / "out")


def test_the_same_is_said_to_who_labels_from_python(tmp_path):
    folder = shutil.copytree(WEIGHTS / "blip", tmp_path / "blip")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BackendError, match="comes without a tokenizer"):
        Labeler("toy", [f"caption.model={folder}"])


FAILS_FOR_EVERY_ROW = """
            from datapipe.stages.segment import SegmentStage
            probed = SegmentStage.__call__
            def call(self, samples):
                if all(sample.row == 0 and not sample.url for sample in samples):
                    return probed(self, samples)
                raise AttributeError("'Owlv2Output' has no attribute 'pred_masks'")
            SegmentStage.__call__ = call
"""


def broken(tmp_path: Path, code: str) -> dict[str, str]:
    """An environment in which every Python process runs `code` when `datapipe.plan` is first imported."""
    finder = f"""
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "datapipe.plan":
            sys.meta_path.remove(self)
{code}
        return None

sys.meta_path.insert(0, Finder())
"""
    (tmp_path / "sitecustomize.py").write_text(finder)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(PROJECT)))}


def test_a_stage_in_which_every_row_fails_ends_the_run_and_takes_its_shards_back(images, tmp_path):
    env = broken(tmp_path, FAILS_FOR_EVERY_ROW)
    recipe = write_recipe(tmp_path / "recipe.yaml", slice_rows=6)
    done = run(recipe, images, tmp_path / "out", env=env)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("sdd: segment: all of its ")
    assert "rows failed, the first because of AttributeError: 'Owlv2Output' has no attribute 'pred_masks'" in line
    assert "Traceback" not in done.stderr
    assert "contact sheet" not in done.stdout
    recipe_line, input_line, *steps = done.stdout.splitlines()
    assert recipe_line.startswith("recipe ") and input_line.startswith("input ")
    assert steps[-3:] == ["starting Ray", "loading models", "looking for duplicates"]
    assert "phase 1 of 2: 2/2 shards, " in done.stderr and "phase 2 of 2: 0/2 shards, " in done.stderr
    store = Store(str(tmp_path / "out"))
    assert present(store, "raw") == [0, 1]
    assert present(store, "shard") == []  # So that the next run makes them again.


FAILS_IN_ACTORS = """
            import datapipe.recipe
            build = datapipe.recipe.build_stage
            def build_in_actor(name, recipe):
                if name.value == "ground" and sys._getframe(1).f_globals["__name__"] != "datapipe.probe":
                    raise TypeError("a mistake of this project's")
                return build(name, recipe)
            datapipe.recipe.build_stage = build_in_actor
"""


def test_whatever_fails_inside_an_actor_is_one_line(images, tmp_path):
    done = run(write_recipe(tmp_path / "recipe.yaml"), images, tmp_path / "out", env=broken(tmp_path, FAILS_IN_ACTORS))
    assert done.returncode == 2, done.stderr
    assert "sdd: a worker failed: TypeError: a mistake of this project's (" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_run_in_which_nothing_could_be_fetched_ends_with_2_and_the_next_one_tries_again(tmp_path):
    table = tmp_path / "urls.csv"
    table.write_text("url\n" + "".join(f"http://127.0.0.1:9/{i}.jpg\n" for i in range(3)))
    recipe = write_recipe(tmp_path / "recipe.yaml", fetch={"retries": 0})
    done = run(recipe, table, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "sdd: fetch: all of its 3 rows failed, the first because of " in done.stderr.strip().splitlines()[-1]
    assert present(Store(str(tmp_path / "out")), "raw") == []


class Fails:
    """Fails for the rows that it is told to."""

    name = StageName.GROUND
    micro_batch = 4

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.fails = fails

    def bucket(self, sample: Sample) -> object:
        return None

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        if any(self.fails(s.row) for s in samples):
            raise ValueError("no")
        return list(samples)


def through(stage: Fails, rows: int, ledger: Ledger) -> list[Sample]:
    deaths = ledger.open(0, stage.name)
    samples = [Sample(row=i) for i in range(rows)]
    return run_stage(stage, samples, slice_index=0, ledger=ledger, deaths=deaths, deadline_s=60)


def test_a_stage_that_fails_for_row_after_row_ends_the_run_early():
    ledger = Ledger()
    with pytest.raises(RunError, match=r"ground: all of its 32 rows failed, the first because of ValueError: no"):
        through(Fails(lambda row: True), 1000, ledger)
    assert ledger.tallies[StageName.GROUND, 0].rows == HOPELESS_AFTER


@pytest.mark.parametrize("good", [0, 17, 63])
def test_one_row_that_passes_shows_that_the_stage_works(good):
    ledger = Ledger(hopeless_after=100 if good > HOPELESS_AFTER else HOPELESS_AFTER)
    done = through(Fails(lambda row: row != good), 64, ledger)
    assert [s.row for s in done if s.verdict is None] == [good]
    assert ledger.hopeless() is None


def test_a_list_of_addresses_may_begin_with_a_dead_host():
    ledger = Ledger(patient_with=frozenset({StageName.GROUND}))
    assert len(through(Fails(lambda row: row < 300), 301, ledger)) == 301
    assert ledger.hopeless() is None


def test_a_few_rows_that_all_fail_are_told_at_the_end():
    ledger = Ledger()
    (done,) = through(Fails(lambda row: True), 1, ledger)
    assert done.verdict and done.verdict.reason is Reason.ERROR
    hopeless = ledger.hopeless()
    assert hopeless is not None
    assert (hopeless.stage, hopeless.slices) == (StageName.GROUND, [0])
    assert hopeless.what.startswith("ground: all of its 1 rows failed")
    nothing = Ledger()
    nothing.end(0, StageName.GROUND, Tally())
    assert nothing.hopeless() is None
