"""`sdd sample --from`: each line of a file is drawn once, and one bad line is named before any is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.sampling.drawing import read_drawing

MUG = {"prompt": "a mug", "subjects": [{"tag": "mug", "references": "mug.png"}]}


def write(*lines: object) -> Path:
    path = Path("lines/prompts.jsonl")
    path.parent.mkdir(exist_ok=True)
    for name in ("mug.png", "mug-back.png", "photo.png", "mug-mask.png", "fish.png"):
        (path.parent / name).write_bytes(Path(name).read_bytes())
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.fixture
def lines(pictures) -> Path:
    masked = {"image": "photo.png", "mask": "mug-mask.png"}
    two = [{"tag": "mug", "references": ["mug-back.png", masked], "box": [0, 0, 0.5, 1]}]
    two.append({"tag": "fish", "references": "fish.png"})
    return write(
        MUG | {"images": 2},
        "",
        {"prompt": "a mug and a fish", "subjects": two, "name": "both", "seed": 9, "settings": {"guidance_scale": 3}},
    )


def test_every_line_is_drawn_with_its_own_and_the_common_settings(sdd, run, lines):
    words = ("sample", "--run", run, "--from", lines, "--out", "drawn", "--images", "1")
    common = ("--set", "guidance_scale=2", "--set", "subject_scale=0.5")
    code, printed, error = sdd(*words, *common)
    assert code == 0 and "pictures: drawn/*-seed-*.png" in printed, error
    assert {p.name for p in Path("drawn").iterdir()} == {"0001-seed-0.png", "0001-seed-1.png", "both-seed-9.png"}
    first, both = (read_drawing(Path(f"drawn/{name}")) for name in ("0001-seed-1.png", "both-seed-9.png"))
    assert (first.settings.guidance_scale, both.settings.guidance_scale) == (2, 3)
    assert first.settings.subject_scale == both.settings.subject_scale == 0.5
    assert [r.path for r in both.subjects[0].references] == ["lines/mug-back.png", "lines/photo.png"]
    Path("drawn/0001-seed-1.png").unlink()
    written = {p: p.stat().st_mtime_ns for p in Path("drawn").iterdir()}
    code, printed, _ = sdd(*words, *common)
    assert code == 0 and "already in drawn: 2 of them" in printed
    assert Path("drawn/0001-seed-1.png").exists() and {p: p.stat().st_mtime_ns for p in written} == written
    assert sdd("sample", "--again", "drawn/both-seed-9.png", "--out", "drawn")[0] == 0


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "prompts.jsonl:2: "),
        ("[1]", "each line is a JSON object"),
        ({"subjects": []}, "prompts.jsonl:2: prompt"),
        (MUG | {"seeds": 1}, "unknown key seeds"),
        (MUG | {"settings": {"guidance": 7}}, "prompts.jsonl, 0002: settings: unknown key guidance"),
        (MUG | {"settings": 7}, "prompts.jsonl:2: settings"),
        (MUG | {"seed": 2**64}, "prompts.jsonl:2: seed"),
        (MUG | {"name": "a/../../b"}, "prompts.jsonl:2: name"),
        (MUG | {"name": "0001"}, "two lines are called 0001"),
        (MUG | {"prompt": "a hat"}, "prompts.jsonl, 0002: prompt 'a hat' does not contain"),
        (MUG | {"height": 30}, "0002: height=30"),
        ({"prompt": "a mug", "subjects": [{"tag": "mug", "references": []}]}, "prompts.jsonl:2: subjects"),
        ({"prompt": "a mug", "subjects": [{"tag": "mug", "references": "nowhere.png"}]}, "lines/nowhere.png: not a"),
        ({"prompt": "a mug", "subjects": [{"tag": "mug", "references": "mug.png", "box": [0, 0, 2, 1]}]}, "lies not"),
    ],
)
def test_one_bad_line_is_named_and_nothing_is_drawn(refused, run, pictures, line, named):
    error = refused("sample", "--run", run, "--from", write(MUG, line), "--out", "drawn")
    assert named in error and not Path("drawn").exists()


def test_a_file_that_is_not_there_or_empty_is_one_line(refused, run, pictures):
    assert "nowhere.jsonl: not a text that can be read" in refused("sample", "--run", run, "--from", "nowhere.jsonl")
    assert "no prompts" in refused("sample", "--run", run, "--from", write(""))
    assert "not a text that can be read" in refused("sample", "--run", run, "--from", "mug.png")
