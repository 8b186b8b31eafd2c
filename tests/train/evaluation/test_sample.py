"""`sdd sample` draws what its options say, and says in one line what it cannot draw."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.documents import marked
from tests.toy import PROJECT
from tests.train.datasets import write_dataset
from tests.train.training import training_recipe
from train.trainer.launch import train

PROMPT = "a mug and a fish"


@pytest.fixture(scope="module")
def run(sd1, clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling")
    recipe = training_recipe(sd1, clip, write_dataset(folder / "dataset", (6,)), optimizer={"steps": 3})
    assert train(recipe, folder / "run")
    return folder / "run"


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a mug, three ways of saying where it is, and a fish."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:25, 20:35] = 255
    Image.fromarray(pixels).save(tmp_path / "mug.png")
    Image.fromarray(mask).save(tmp_path / "mug-mask.png")
    Image.fromarray(np.dstack([pixels, mask])).save(tmp_path / "mug-cut.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # seen upright when turned by 90 degrees clockwise
    Image.fromarray(np.dstack([pixels, mask])).rotate(90, expand=True).save(tmp_path / "mug-turned.png", exif=turned)
    Image.new("RGB", (20, 20), "orange").save(tmp_path / "fish.jpg")
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "cut-short.png").write_bytes((tmp_path / "mug.png").read_bytes()[:900])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn(sdd, run: Path, *words: str) -> dict[str, np.ndarray]:
    """By file name."""
    shutil.rmtree("drawn", ignore_errors=True)
    code, printed, error = sdd("sample", PROMPT, "--run", run, "--out", "drawn", *words)
    assert code == 0, error
    assert "drawn/seed-*.png" in printed
    return {path.name: np.asarray(Image.open(path), np.int16) for path in Path("drawn").iterdir()}


def same_but_for_rounding(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= 2)


def test_each_seed_has_a_picture_of_its_own_whatever_the_others(sdd, run, pictures):
    two = drawn(sdd, run, "--subject", "mug=mug.png", "--images", "2", "--seed", "7")
    one = drawn(sdd, run, "--subject", "mug=mug.png", "--images", "1", "--seed", "8")
    assert set(two) == {"seed-7.png", "seed-8.png"} and set(one) == {"seed-8.png"}
    assert np.abs(two["seed-8.png"] - one["seed-8.png"]).max() <= 2, "but for rounding"
    assert np.abs(two["seed-7.png"] - one["seed-8.png"]).max() > 2


def test_a_mask_is_a_file_or_the_pictures_transparency_and_pictures_are_upright(sdd, run, pictures):
    def of(*words: str) -> np.ndarray:
        return drawn(sdd, run, "--images", "1", *words)["seed-0.png"]

    by_file = of("--subject", "mug=mug.png", "--mask", "mug=mug-mask.png")
    assert np.array_equal(of("--subject", "mug=mug-cut.png"), by_file)
    assert np.array_equal(of("--subject", "mug=mug-turned.png"), by_file)
    assert not np.array_equal(of("--subject", "mug=mug.png"), by_file)


@pytest.mark.parametrize("name", ["model", "sample"])
def test_the_documents_command(sdd, run, monkeypatch, name):
    monkeypatch.chdir(PROJECT)
    (words,) = [words for _, *words in marked(name).commands if words[0] == "sample"]
    shutil.rmtree(run / "samples", ignore_errors=True)
    code, _, error = sdd(*words, "--run", run)
    assert code == 0, error
    assert len(list((run / "samples").iterdir())) == 4


def test_boxes_sizes_and_settings_are_what_is_asked(sdd, run, pictures):
    both = ("--subject", "mug=mug.png", "--subject", "fish=fish.jpg", "--images", "1")
    pictures_of = {
        words: drawn(sdd, run, *both, *words)["seed-0.png"]
        for words in (
            (),
            ("--box", "fish=0,0.5,0.4,1"),
            ("--set", "guidance_scale=9"),
            ("--height", "32", "--width", "48"),
        )
    }
    assert [p.shape for p in pictures_of.values()] == [(64, 64, 3)] * 3 + [(32, 48, 3)]
    plain, boxed, guided, _ = pictures_of.values()
    assert not np.array_equal(plain, boxed) and not np.array_equal(plain, guided)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--subject", "mug.png"], "--subject mug.png: write the tag"),
        (["--subject", "mug=mug.png", "--subject", "mug=fish.jpg"], "mug comes twice"),
        (["--subject", "mug=nowhere.png"], "nowhere.png: not a picture"),
        (["--subject", "mug=notes.png"], "notes.png: not a picture"),
        (["--subject", "mug=cut-short.png"], "cut-short.png: not a picture"),
        (["--subject", "mug=mug.png", "--out", "mug.png"], "--out mug.png: there is a file"),
        (["--subject", "robot=mug.png"], "does not contain its subject's tag 'robot'"),
        (["--subject", "mug=mug.png", "--mask", "fish=fish.jpg"], "no --subject is called fish"),
        (["--subject", "mug=fish.jpg", "--mask", "mug=mug-mask.png"], "they must be the same size"),
        (["--subject", "mug=mug.png", "--box", "mug=left"], "write four numbers"),
        (["--subject", "mug=mug.png", "--box", "mug=0,0,2,1"], "lies not inside the image"),
        (["--subject", "mug=mug.png", "--subject", "fish=fish.jpg", "--subject", "a=fish.jpg"], "3 subjects"),
        (["--subject", "mug=mug.png", "--set", "guidance=7"], "unknown key guidance"),
        (["--subject", "mug=mug.png", "--height", "30"], "30"),
        (["--subject", "mug=mug.png", "--run", "elsewhere"], "elsewhere: no training run"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(sdd, run, pictures, words, named):
    code, printed, error = sdd("sample", PROMPT, "--run", run, "--out", "drawn", *words)
    assert code == 2 and not printed and not Path("drawn").exists()
    assert error.startswith("sdd: ") and error.count("\n") == 1 and named in error, error


def test_a_checkpoint_or_a_pipeline_draws_what_its_run_does(sdd, run, pictures):
    words = ("--subject", "mug=mug.png", "--images", "1")
    expected = drawn(sdd, run, *words)["seed-0.png"]
    shutil.copytree(run / "pipeline", "downloaded")
    shutil.copytree(run, "unfinished", ignore=shutil.ignore_patterns("pipeline"))
    for model in ("downloaded", "unfinished", "unfinished/checkpoints/step-00000003"):
        assert same_but_for_rounding(drawn(sdd, Path(model), *words)["seed-0.png"], expected), model
    before = drawn(sdd, run / "checkpoints/step-00000002", *words)["seed-0.png"]
    assert not same_but_for_rounding(before, expected)


def test_the_pipeline_of_a_checkpoint_is_exported(sdd, run, pictures):
    code, printed, error = sdd("train", "--export", "2", "--out", run)
    assert code == 0, error
    assert printed == f"pipeline: {run}/pipeline-00000002\n"
    words = ("--subject", "mug=mug.png", "--images", "1")
    of_checkpoint = drawn(sdd, run / "checkpoints/step-00000002", *words)["seed-0.png"]
    assert same_but_for_rounding(drawn(sdd, run / "pipeline-00000002", *words)["seed-0.png"], of_checkpoint)
    code, _, error = sdd("train", "--export", "1", "--out", run)
    assert code == 2 and error.endswith(f"{run}: no checkpoint of step 1; there are 2, 3\n")


def test_a_run_that_has_saved_nothing_has_nothing_to_draw_with(sdd, run, pictures):
    shutil.copytree(run, "unfinished", ignore=shutil.ignore_patterns("pipeline*", "checkpoints"))
    code, _, error = sdd("sample", PROMPT, "--subject", "mug=mug.png", "--run", "unfinished")
    assert code == 2 and "unfinished: its training has saved nothing yet" in error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["sample", PROMPT, "--subject", "mug"], "--subject mug: write the tag"),
        (["sample", PROMPT, "--subject", "mug=mug.png", "--run", "elsewhere"], "elsewhere: no training run"),
        (["evaluate", "elsewhere"], "elsewhere: no training run"),
        (["train", "--recipe", "elsewhere.yaml"], "elsewhere.yaml: no such file"),
        (["ablate", "--recipe", "elsewhere.yaml"], "elsewhere.yaml: no such file"),
    ],
)
def test_a_mistake_is_answered_before_torch_is_imported(words, named):
    code = f"import sys; sys.argv = {['sdd', *words]!r}; from sdd.cli import main\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    answered = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert answered.returncode == 2 and named in answered.stderr
    assert answered.stdout == "False\n"
