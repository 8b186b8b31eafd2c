"""A picture says how it was made, and can be drawn again to the pixel, or what has changed is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.toy import PROJECT
from train.sampling.drawing import KEY, read_drawing

SAMPLE = ("sample", "a mug and a fish", "--subject", "mug=mug.png", "--subject", "fish=fish.png", "--out", "drawn")


@pytest.fixture
def picture(sdd, run, pictures) -> Path:
    code, _, error = sdd(*SAMPLE, "--run", run, "--images", "1", "--seed", "5", "--box", "fish=0,0,0.5,0.5")
    assert code == 0, error
    return Path("drawn/seed-5.png")


def rewritten(picture: Path, said: str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, said)
    Image.open(picture).save("other.png", pnginfo=info)
    return Path("other.png")


def test_a_picture_is_drawn_again_to_the_pixel_in_another_process(picture):
    words = ["sample", "--again", str(picture), "--out", "elsewhere"]
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); sys.argv = {['sdd', *words]!r}\n"
    code += "from sdd.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    again = Path("elsewhere/seed-5-again.png")
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(picture)))
    assert read_drawing(again) == read_drawing(picture)


def test_two_pictures_of_one_name_are_drawn_again_side_by_side(sdd, run, pictures, picture):
    code, _, error = sdd(*SAMPLE[:-1], "other", "--run", run, "--images", "1", "--seed", "5")
    assert code == 0, error
    for folder in ("drawn", "other", "drawn"):
        assert sdd("sample", "--again", f"{folder}/seed-5.png", "--out", "again")[0] == 0
    assert sorted(path.name for path in Path("again").iterdir()) == ["seed-5-again-2.png", "seed-5-again.png"]
    assert read_drawing(Path("again/seed-5-again.png")) == read_drawing(picture)
    assert read_drawing(Path("again/seed-5-again-2.png")) == read_drawing(Path("other/seed-5.png"))


def test_a_sheet_is_drawn_again_too(sdd, run, pictures):
    sdd(*SAMPLE, "--run", run, "--interpolate", "2")
    code, printed, error = sdd("sample", "--again", "drawn/grid-seed-0.png", "--out", "drawn")
    assert code == 0 and "picture: drawn/grid-seed-0-again.png" in printed, error
    once, again = (np.asarray(Image.open(f"drawn/grid-seed-0{end}.png")) for end in ("", "-again"))
    assert np.array_equal(once, again)


def test_a_picture_tells_what_decided_it(picture, run):
    drawing = read_drawing(picture)
    assert (drawing.prompt, drawing.seed, drawing.model) == ("a mug and a fish", 5, str(run))
    mug, fish = drawing.subjects
    assert fish.box == (0, 0, 0.5, 0.5) and mug.box is not None
    assert mug.references[0].rle().array().sum() == 20 * 15
    assert drawing.settings.num_inference_steps > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: Path("mug.png").unlink(), "its reference mug.png is not there"),
        (lambda: shutil.copy("mug-back.png", "mug.png"), "its reference mug.png has changed since"),
    ],
)
def test_a_reference_that_is_gone_or_changed_is_named(refused, picture, change, named):
    change()
    error = refused("sample", "--again", picture, "--out", "again")
    assert error.startswith(f"sdd: {picture}: ") and named in error and not Path("again").exists()


def test_a_model_that_is_gone_or_changed_is_named(sdd, refused, picture, run):
    shutil.copytree(run, "copied")
    config = Path("copied/pipeline/scheduler/scheduler_config.json")
    config.write_text(config.read_text() + "\n")
    error = refused("sample", "--again", picture, "--run", "copied")
    assert "has changed since (SHA-256 " in error
    assert "nowhere: no training run" in refused("sample", "--again", picture, "--run", "nowhere")
    assert sdd("sample", "--again", picture, "--run", run, "--out", "again")[0] == 0


def test_another_version_is_said_and_drawn_all_the_same(sdd, picture):
    said = json.loads(Image.open(picture).info[KEY]) | {"torch": "1.0"}
    code, _, error = sdd("sample", "--again", rewritten(picture, json.dumps(said)), "--out", "again")
    assert code == 0 and "other.png: drawn with torch 1.0, here " in error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 2}, "damaged (format: "),
        ({"seed": -1}, "damaged (seed: "),
        ({"seed": 2**64}, "damaged (seed: "),
        ({"more": 1}, "damaged (more: "),
        ({"axes": [["nonsense", [1]]]}, "unknown key nonsense"),
        ({"model": "/nowhere"}, "/nowhere: no training run"),
        ("mask", "damaged (the mask of mug.png)"),
        ("size", "damaged (the mask of mug.png)"),
        ("umlaut", "damaged (subjects"),
    ],
)
def test_what_a_stranger_wrote_into_a_picture_is_not_believed(refused, picture, change, named):
    said = json.loads(Image.open(picture).info[KEY])
    if isinstance(change, dict):
        said |= change
    else:
        reference = said["subjects"][0]["references"][0]
        reference["mask"] = {"mask": "zzz", "size": reference["mask"], "umlaut": "ü"}[change]
        if change == "size":
            reference["mask_size"] = [10**9, 10**9]
    assert named in refused("sample", "--again", rewritten(picture, json.dumps(said)), "--out", "again")
    assert not Path("again").exists()


@pytest.mark.parametrize("words", [("--set", "alpha=1"), ("--images", "2"), ("--seed", "0"), ("--labels", "toy")])
def test_what_a_picture_says_itself_is_not_said_beside_it(refused, pictures, words):
    assert "only --run and --out may stand beside it" in refused("sample", "--again", "mug.png", *words)


@pytest.mark.parametrize("text", ["", "[]", "not JSON", "{}"])
def test_text_that_is_no_drawing_is_one_line(refused, picture, text):
    assert "damaged" in refused("sample", "--again", rewritten(picture, text))


@pytest.mark.parametrize("name", ["nowhere.png", "notes.png", "cut-short.png", "mug.png"])
def test_a_file_that_is_no_such_picture_is_one_line(refused, pictures, name):
    assert f"{name}: " in refused("sample", "--again", name)
