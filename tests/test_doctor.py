"""What could stop a run is found before any work, one line per check; and a run says the cheap part of it by itself."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from datapipe.machine import Check, check_out, judge_disk, judge_memory, judge_open_files
from datapipe.shards import Store
from tests.toy import PROJECT, write_images, write_recipe

GB = 10**9


def doctor(*words: str | Path, env: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """Exit code and lines of `sdd doctor` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "sdd", "doctor", *map(str, words)],
        cwd=PROJECT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines()


def test_all_is_well_for_the_toy_recipe_and_nothing_is_left_behind(tmp_path):
    write_images(tmp_path / "images", 12)
    rows = len(list((tmp_path / "images").glob("*.jpg")))
    code, lines = doctor("toy", "--input", tmp_path / "images", "--out", tmp_path / "out")
    assert code == 0, lines
    assert all(line.startswith("ok    ") for line in lines), lines
    said = "\n".join(lines)
    for what in (
        "python 3.",
        "torch ",
        "transformers ",
        "GB of memory free",
        "open files",
        "free at ",
        f": {rows} rows",
    ):
        assert what in said
    assert f"ok    {tmp_path / 'out'} can be written" in lines
    for stage in ("caption", "tag", "ground", "segment", "select"):
        assert f"ok    {stage} answers on an image in " in said
    assert "hub" not in said, "the toy models come along"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_a_model_that_is_not_there_or_does_not_answer_is_told_and_the_others_are_asked(tmp_path):
    (tmp_path / "blip").mkdir()
    sam = shutil.copytree(PROJECT / "toyworld/weights/sam", tmp_path / "sam")
    tensors = load_file(sam / "model.safetensors")
    save_file({name: tensor.fill_(float("nan")) for name, tensor in tensors.items()}, sam / "model.safetensors")
    recipe = write_recipe(
        tmp_path / "recipe.yaml", caption={"model": str(tmp_path / "blip")}, segment={"model": str(sam)}
    )
    code, lines = doctor(recipe, "--out", tmp_path / "out")
    assert code == 2
    missing, silent = [line for line in lines if not line.startswith("ok    ")]
    assert missing.startswith(f"FAIL  caption.model {tmp_path / 'blip'}: the folder holds no config.json")
    assert silent.startswith("FAIL  segment: its model cannot answer on a test image: FloatingPointError")
    assert any(line.startswith("ok    ground answers") for line in lines)


def test_each_thing_out_of_reach_is_a_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    recipe = write_recipe(tmp_path / "recipe.yaml", caption={"model": "toy/none"})
    code, lines = doctor(
        recipe, "--out", tmp_path / "file/out", "--input", tmp_path / "none.csv", "--ray-address", "127.0.0.1:9",
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert code == 2
    told = [line for line in lines if not line.startswith("ok    ")]
    for line, (level, what) in zip(
        told,
        [
            ("FAIL", f"{tmp_path / 'file/out'}: there is a file where a folder is wanted"),
            ("FAIL", f"input {tmp_path / 'none.csv'}: "),
            ("warn", "the hub at http://127.0.0.1:9 cannot be reached"),
            ("FAIL", "caption.model toy/none: not in the cache"),
            ("FAIL", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9"),
        ],
        strict=True,
    ):
        assert line.startswith(f"{level:<4}  {what}"), line


def test_a_bucket_is_tried_by_writing_to_it(bucket):
    out = f"{bucket}/of-the-doctor"
    assert list(check_out(out))[-1] == Check("ok", f"{out} can be written")
    assert Store(out).names() == []
    last = list(check_out("s3://none-of-this-name/out"))[-1]
    assert last.level == "FAIL" and last.text.startswith("s3://none-of-this-name/out/")


@pytest.mark.parametrize(
    ("check", "level"),
    [
        (judge_memory(16 * GB), "ok"),
        (judge_memory(GB), "warn"),
        (judge_open_files(resource.RLIM_INFINITY), "ok"),
        (judge_open_files(8192), "ok"),
        (judge_open_files(1024), "warn"),
        (judge_disk(Path("/"), 100 * GB, 1000 * GB, rays=True), "ok"),
        (judge_disk(Path("/"), 40 * GB, 1000 * GB, rays=True), "warn"),
        (judge_disk(Path("/"), 40 * GB, 1000 * GB, rays=False), "ok"),
        (judge_disk(Path("/"), 2 * GB, 4 * GB, rays=False), "warn"),
        (judge_disk(Path("/"), GB // 10, 4 * GB, rays=False), "FAIL"),
        (judge_disk(Path("/"), 0, 0, rays=False), "ok"),
    ],
    ids=str,
)
def test_a_machine_is_judged_by_its_numbers(check, level):
    assert str(check).startswith(f"{level:<4}  ")


def test_a_run_says_what_is_wrong_with_the_machine_first_and_else_nothing(tmp_path):
    run = f"exec {sys.executable} -m sdd dataset --recipe toy --input {tmp_path / 'none.csv'} --out {tmp_path / 'out'}"

    def said(shell: str) -> list[str]:
        done = subprocess.run(["bash", "-c", shell], cwd=PROJECT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        return done.stderr.splitlines()

    (only,) = said(run)
    assert only.startswith("sdd: input ")
    assert said(f"ulimit -n 1024; {run}") == [
        "warn  at most 1,024 open files, and Ray wants 8,192; have `ulimit -Hn` raised", only
    ]  # fmt: skip


def test_a_run_that_cannot_write_does_nothing_before(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    error = refused("dataset", "--recipe", "toy", "--out", tmp_path / "file/out", "--set", "toyworld.images=99999")
    assert f"{tmp_path / 'file/out'}: there is a file where a folder is wanted" in error
