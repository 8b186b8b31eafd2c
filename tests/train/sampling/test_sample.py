"""`sdd sample` draws what its options say, and says in one line what it cannot draw."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.documents import marked
from tests.toy import PROJECT
from train.sampling.drawing import read_drawing
from train.sampling.trained import find_model

PROMPT = "a mug and a fish"
MUG = ("--subject", "mug=mug.png")
ONE = (*MUG, "--images", "1")


def drawn(sdd, run: Path, *words: str) -> dict[str, np.ndarray]:
    """By file name."""
    shutil.rmtree("drawn", ignore_errors=True)
    code, printed, error = sdd("sample", PROMPT, "--run", run, "--out", "drawn", *words)
    assert code == 0, error
    assert "pictures: drawn/" in printed
    return {path.name: np.asarray(Image.open(path), np.int16) for path in Path("drawn").iterdir()}


def one(sdd, run: Path, *words: str) -> np.ndarray:
    (picture,) = drawn(sdd, run, "--images", "1", *words).values()
    return picture


def test_each_seed_has_a_picture_of_its_own_whatever_the_others(sdd, run, pictures):
    two = drawn(sdd, run, *MUG, "--images", "2", "--seed", "7")
    alone = drawn(sdd, run, *MUG, "--images", "1", "--seed", "8")
    assert set(two) == {"seed-7.png", "seed-8.png"} and set(alone) == {"seed-8.png"}
    assert np.array_equal(two["seed-8.png"], alone["seed-8.png"])
    assert np.abs(two["seed-7.png"] - alone["seed-8.png"]).max() > 2


def test_a_mask_is_a_file_or_the_pictures_transparency_and_pictures_are_upright(sdd, run, pictures):
    by_file = one(sdd, run, "--subject", "mug=photo.png", "--mask", "mug=mug-mask.png")
    assert np.array_equal(one(sdd, run, *MUG), by_file)
    assert np.array_equal(one(sdd, run, "--subject", "mug=mug-turned.png"), by_file)
    assert not np.array_equal(one(sdd, run, "--subject", "mug=mug-back.png"), by_file)


def test_a_comma_is_between_references_and_another_subject_of_the_tag_is_an_option_again(sdd, run, pictures):
    both = drawn(sdd, run, "--subject", "mug=mug.png,photo.png", "--mask", "mug=,mug-mask.png", "--images", "1")
    (together,) = read_drawing(Path("drawn/seed-0.png")).subjects
    assert [Path(r.path).name for r in together.references] == ["mug.png", "photo.png"]
    assert together.references[0].mask == together.references[1].mask
    boxes = ("--box", "mug=0,0,0.5,1", "--box", "mug=0.5,0,1,1")
    two = drawn(sdd, run, *MUG, "--subject", "mug=mug-back.png", *boxes, "--images", "1")
    first, second = read_drawing(Path("drawn/seed-0.png")).subjects
    assert (first.box, second.box) == ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
    assert [r.path for s in (first, second) for r in s.references] == ["mug.png", "mug-back.png"]
    assert not np.array_equal(both["seed-0.png"], two["seed-0.png"])


@pytest.mark.parametrize("name", ["model", "sample"])
def test_the_documents_command(sdd, run, monkeypatch, name):
    monkeypatch.chdir(PROJECT)
    words = next(words for _, *words in marked(name).commands if words[0] == "sample")
    shutil.rmtree(run / "samples", ignore_errors=True)
    code, _, error = sdd(*words, "--run", run)
    assert code == 0, error
    assert len(list((run / "samples").iterdir())) == 4


def test_boxes_sizes_and_settings_are_what_is_asked(sdd, run, pictures):
    both = (*MUG, "--subject", "fish=fish.png")
    pictures_of = {
        words: one(sdd, run, *both, *words)
        for words in (
            (),
            ("--box", "fish=0,0.5,0.4,1"),
            ("--set", "guidance_scale=9"),
            ("--set", "subject_scale=0"),
            ("--height", "32", "--width", "48"),
        )
    }
    assert [p.shape for p in pictures_of.values()] == [(64, 64, 3)] * 4 + [(32, 48, 3)]
    plain, boxed, guided, _, _ = pictures_of.values()
    assert not np.array_equal(plain, boxed) and not np.array_equal(plain, guided)


def test_a_checkpoint_or_a_pipeline_draws_what_its_run_does(sdd, run, pictures):
    expected = one(sdd, run, *MUG)
    shutil.copytree(run / "pipeline", "downloaded")
    shutil.copytree(run, "unfinished", ignore=shutil.ignore_patterns("pipeline"))
    for model in ("downloaded", "unfinished", "unfinished/checkpoints/step-00000003"):
        assert np.abs(one(sdd, Path(model), *MUG) - expected).max() <= 2, model  # but for rounding
    assert np.abs(one(sdd, run / "checkpoints/step-00000002", *MUG) - expected).max() > 2


def test_the_pipeline_of_a_checkpoint_is_exported(sdd, run, pictures):
    code, printed, error = sdd("train", "--export", "2", "--out", run)
    assert code == 0, error
    assert printed == f"pipeline: {run}/pipeline-00000002\n"
    of_checkpoint = one(sdd, run / "checkpoints/step-00000002", *MUG)
    assert np.abs(one(sdd, run / "pipeline-00000002", *MUG) - of_checkpoint).max() <= 2
    code, _, error = sdd("train", "--export", "1", "--out", run)
    assert code == 2 and error.endswith(f"{run}: no checkpoint of step 1; there are 2, 3\n")


def test_a_picture_that_is_there_is_drawn_again_only_if_it_would_be_another(sdd, run, pictures):
    words = ("sample", PROMPT, "--run", run, "--out", "drawn")
    drawn(sdd, run, *MUG, "--images", "2")
    before = {path: path.stat().st_mtime_ns for path in Path("drawn").iterdir()}
    code, printed, _ = sdd(*words, *MUG, "--images", "3")
    assert code == 0 and "already in drawn: 2 of them" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before and Path("drawn/seed-2.png").exists()
    Path("drawn/seed-1.png").write_bytes(b"damaged")
    _, printed, _ = sdd(*words, *MUG, "--images", "3", "--seed", "0")
    assert "already in drawn: 2 of them" in printed
    _, printed, _ = sdd(*words, *MUG, "--images", "3", "--set", "guidance_scale=9")
    assert "already" not in printed
    shutil.copy("mug-back.png", "mug.png")
    _, printed, _ = sdd(*words, *MUG, "--images", "3", "--set", "guidance_scale=9")
    assert "already" not in printed


def test_another_picture_of_the_same_name_stays_and_each_is_found_again(sdd, run, pictures):
    words = ("--run", run, "--out", "drawn", "--images", "1", "--set", "num_inference_steps=1")
    assert sdd("sample", "a mug", *words)[0] == sdd("sample", "a fish", *words)[0] == 0
    prompts = {path: read_drawing(path).prompt for path in Path("drawn").iterdir()}
    assert prompts.pop(Path("drawn/seed-0.png")) == "a mug" and list(prompts.values()) == ["a fish"]
    for prompt in ("a mug", "a fish"):
        assert "already in drawn: 1 of them" in sdd("sample", prompt, *words)[1]


def test_a_grid_shows_every_combination_as_it_is_drawn_alone(sdd, run, pictures):
    grid = ("--grid", "guidance_scale=1,9", "--grid", "subject_scale=0,0.5,1")
    drawings = drawn(sdd, run, *MUG, *grid)
    assert set(drawings) == {"grid-seed-0.png"}
    sheet = drawings["grid-seed-0.png"]
    width = sheet.shape[1] - (sheet.shape[1] - 64 * 2 - 4)
    assert width == 132 and sheet.shape[0] > 3 * 64 + 2 * 4
    alone = one(sdd, run, *MUG, "--set", "guidance_scale=9", "--set", "subject_scale=0.5")
    assert np.array_equal(sheet[-(2 * 64 + 4) : -(64 + 4), -64:], alone)
    assert (sheet[: -(3 * 64 + 8)] < 128).any(), "labels"


def test_interpolation_runs_from_the_subject_model_to_the_base(sdd, run, pictures):
    sheet = drawn(sdd, run, *MUG, "--interpolate", "3")["grid-seed-0.png"]
    ends = [one(sdd, run, *MUG, "--set", f"alpha={alpha}") for alpha in (0, 1)]
    assert np.array_equal(sheet[-64:, :64], ends[0]) and np.array_equal(sheet[-64:, -64:], ends[1])
    other = one(sdd, run, "--subject", "mug=mug-back.png", "--set", "alpha=1")
    assert np.array_equal(ends[1], other), "the base alone sees no reference"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--subject", "mug.png"], "--subject mug.png: write the tag"),
        (["--subject", "mug=nowhere.png"], "nowhere.png: not a picture"),
        (["--subject", "mug=mug.png,"], "not a picture"),
        (["--subject", "mug=notes.png"], "notes.png: not a picture"),
        (["--subject", "mug=cut-short.png"], "cut-short.png: not a picture"),
        ([*MUG, "--out", "mug.png"], "--out mug.png: there is a file"),
        ([*MUG, "--out", "mug.png/drawn"], "--out mug.png/drawn: "),
        ([*MUG, "--out", "/proc/drawn"], "--out /proc/drawn: "),
        (["--subject", "robot=mug.png"], "does not contain its subject's tag 'robot'"),
        ([*MUG, "--mask", "fish=fish.png"], "no --subject is called fish"),
        ([*MUG, "--box", "mug=0,0,1,1", "--box", "mug=0,0,1,1"], "more of them than there are subjects called mug"),
        (["--subject", "mug=mug.png,photo.png", "--mask", "mug=mug-mask.png"], "1 for 2 references"),
        (["--subject", "mug=fish.png", "--mask", "mug=mug-mask.png"], "they must be the same size"),
        (["--subject", "mug=photo.png", "--mask", "mug=empty.png"], "an empty mask"),
        (["--subject", "mug=photo.png", "--mask", "mug=mug-mask.png", "--at", "mug=0.5,0.5"], "give one of them"),
        ([*MUG, "--at", "mug=left"], "write two or four numbers"),
        ([*MUG, "--at", "mug=1.5,0"], "lies not inside the picture"),
        ([*MUG, "--at", "mug=0.5,0,0.2,1"], "is no box"),
        ([*MUG, "--box", "mug=left"], "write four numbers"),
        ([*MUG, "--box", "mug=0,0,2,1"], "lies not inside the image"),
        ([*MUG, "--subject", "fish=fish.png", "--subject", "a=fish.png"], "3 subjects"),
        ([*MUG, "--set", "guidance=7"], "unknown key guidance"),
        ([*MUG, "--set", "nosuch=1"], "subject_guidance_scale"),
        ([*MUG, "--grid", "nosuch=1"], ", subject_scale, alpha"),
        ([*MUG, "--set", "subject_scale=2"], "subject_scale"),
        ([*MUG, "--grid", "guidance=7"], "unknown key guidance"),
        ([*MUG, "--grid", "guidance_scale"], "write a setting"),
        ([*MUG, "--grid", "alpha=0,2"], "alpha = 2"),
        ([*MUG, "--grid", "alpha=0,1", "--interpolate", "3"], "the same setting twice"),
        ([*MUG, *["--grid", "alpha=0,1"] * 3], "columns and rows"),
        ([*MUG, "--height", "30"], "height=30"),
        ([*MUG, "--seed", str(2**63 - 2), "--images", "3"], "seeds end at 9223372036854775807"),
        ([*MUG, "--run", "elsewhere"], "elsewhere: no training run"),
        ([*MUG, "--labels", "elsewhere"], "elsewhere: no such file"),
        ([*MUG, "--from", "lines.jsonl"], "leave the prompt"),
        ([*MUG, "--again", "mug.png"], "--again draws what the picture itself says"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(sdd, run, pictures, words, named):
    code, printed, error = sdd("sample", PROMPT, "--run", run, "--out", "drawn", *words)
    assert code == 2 and not printed and not Path("drawn").exists()
    assert error.startswith("sdd: ") and error.count("\n") == 1 and named in error, error


def test_a_run_that_has_saved_nothing_has_nothing_to_draw_with(sdd, run, pictures):
    shutil.copytree(run, "unfinished", ignore=shutil.ignore_patterns("pipeline*", "checkpoints"))
    code, _, error = sdd("sample", PROMPT, *MUG, "--run", "unfinished")
    assert code == 2 and "unfinished: its training has saved nothing yet" in error


def test_a_base_may_draw_oblong_pictures_of_its_own(run, tmp_path):
    shutil.copytree(run / "pipeline", tmp_path / "oblong")
    config = tmp_path / "oblong/unet/config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"sample_size": [said["sample_size"], 2 * said["sample_size"]]}))
    assert find_model(run).size == (64, 64) and find_model(tmp_path / "oblong").size == (64, 128)


def test_mistakes_are_answered_before_torch_is_imported(run, pictures):
    Path("lines.jsonl").write_text('{"prompt": "a mug", "subjects": [{"tag": "fish", "references": "fish.png"}]}\n')
    words = ["sample", PROMPT, "--run", str(run)]
    mistakes = [
        (["sample", PROMPT, "--subject", "mug"], "--subject mug: write the tag"),
        (["sample", PROMPT, *MUG, "--run", "elsewhere"], "elsewhere: no training run"),
        (["sample", "--run", str(run)], "a prompt is needed"),
        ([*words, "--subject", "cat=mug.png"], "subject's tag 'cat'"),
        ([*words, "--subject", "mug=notes.png"], "notes.png: not a picture"),
        ([*words, *MUG, "--height", "30"], "height=30"),
        (["sample", "--run", str(run), "--from", "lines.jsonl"], "lines.jsonl, 0001: prompt 'a mug'"),
        (["sample", "--again", "mug.png"], "mug.png: it does not say how it was made"),
        (["evaluate", "elsewhere"], "elsewhere: no training run"),
        (["train", "--recipe", "elsewhere.yaml"], "elsewhere.yaml: no such file"),
        (["ablate", "--recipe", "elsewhere.yaml"], "elsewhere.yaml: no such file"),
    ]
    code = f"""
import sys
from sdd.cli import main
for words in {[words for words, _ in mistakes]!r}:
    sys.argv = ["sdd", *words]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 2
print({{"torch", "diffusers"}} & sys.modules.keys())
"""
    answered = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answered.stdout == "set()\n"
    for line, (_, named) in zip(answered.stderr.splitlines(), mistakes, strict=True):
        assert named in line
