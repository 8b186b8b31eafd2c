"""What DreamBench asks for, of its own folder and of one like it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from subject_diffusion.errors import RunError
from tests.toy import PROJECT
from train.benchmark.dreambench import LEFT, RIGHT, dreambench, dreambench_pairs, read_templates
from train.benchmark.humans import humans
from train.benchmark.protocol import Item, Reference

REAL = Path(os.environ.get("SDD_DREAMBENCH", PROJECT.parent / "shared/data/dreambench"))
real_photographs = pytest.mark.skipif(
    not REAL.is_dir(), reason="no DreamBooth dataset; SDD_DREAMBENCH names its folder"
)


@real_photographs
def test_all_of_dreambench():
    protocol = dreambench(REAL, 4)
    assert len(protocol.subjects) == 30 and len(protocol.items) == 30 * 25 * 4
    assert sum(len(s.photographs) for s in protocol.subjects.values()) == 158
    texts = {item.text for item in protocol.items}
    assert "a dog in a chef outfit" in texts and "a stuffed animal floating in an ocean of milk" in texts
    assert not any("{" in text or "  " in text for text in texts)
    assert {s.name for s in protocol.look_alikes("dog")} == {"dog2", "dog3", "dog5", "dog6", "dog7", "dog8"}
    assert protocol.look_alikes("teapot") == []
    assert len({item.seed(0) for item in protocol.items}) == len(protocol.items)


@real_photographs
def test_all_pairs_of_dreambench():
    protocol = dreambench_pairs(REAL.parent / "dreambench_pairs.json", REAL, 1)
    assert len({item.group for item in protocol.items}) == 30 and len(protocol.items) == 750
    assert all([r.box for r in item.references] == [LEFT, RIGHT] for item in protocol.items)
    assert {item.template for item in protocol.items} >= {"a {} and a {} in the jungle", "a red {} and a red {}"}


def test_a_folder_of_the_same_layout(dreambench: Path):
    objects, live = read_templates(dreambench)
    assert objects == ["a {} on grass", "a red {}"] and live == ["a {} in a hat", "a red {}"]
    protocol = dreambench_of(dreambench)
    assert [item.file for item in protocol.items][:3] == ["mug/00-0.png", "mug/00-1.png", "mug/01-0.png"]
    assert {item.text for item in protocol.items if item.group == "cat"} == {"a cat in a hat", "a red cat"}
    assert [s.name for s in protocol.look_alikes("mug")] == ["mug2"]
    only = dreambench_of(dreambench, ["mug2"])
    assert {item.group for item in only.items} == {"mug2"} and set(only.subjects) == {"mug", "mug2", "cat"}
    assert only.items[0].seed(0) == next(i for i in protocol.items if i.group == "mug2").seed(0)


def dreambench_of(folder: Path, only: list[str] | None = None):
    return dreambench(folder, 2, only or [])


def test_a_seed_is_of_subject_prompt_and_index_alone(dreambench: Path):
    item = dreambench_of(dreambench).items[0]
    alike = Item(item.group, 7, "", item.text, item.index, (Reference("other", Path("x")),))
    assert item.seed(0) == alike.seed(0) and 0 <= item.seed(0) < 2**63
    others = [("b", item.text, 0), (item.group, "b", 0), (item.group, item.text, 1)]
    assert item.seed(0) not in {item.seed(1), *(Item(g, 0, "", text, i, ()).seed(0) for g, text, i in others)}


def test_the_identity_follows_the_photographs_bytes(dreambench: Path, tmp_path):
    before = dreambench_of(dreambench).identity()
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for path in dreambench.rglob("*"):
        target = copied / path.relative_to(dreambench)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    assert dreambench_of(copied).identity() == before
    (copied / "mug/00.jpg").write_bytes((copied / "mug/01.jpg").read_bytes())
    after = dreambench_of(copied).identity()
    assert after["photographs"]["mug"] != before["photographs"]["mug"]
    assert after["photographs"]["cat"] == before["photographs"]["cat"]


def prompt(text: str) -> str:
    return f"'{text}'.format(unique_token, class_token)"


def write(folder: Path, text: str) -> None:
    (folder / "prompts_and_classes.txt").write_text(text)


def add(folder: Path, line: str) -> None:
    with (folder / "prompts_and_classes.txt").open("a") as file:
        file.write(f"{line}\n")


def test_a_name_may_have_a_hyphen_and_a_prompt_the_noun_alone(tmp_path):
    from tests.train.benchmark.folders import write_dreambench

    folder = write_dreambench(tmp_path / "data", photographs=1)
    (folder / "mug").rename(folder / "ann-marie")
    (folder / "prompts_and_classes.txt").write_text(f"ann-marie,woman\n\n{prompt('the {1} reads')}\n")
    (item,) = humans(folder, 1).items
    assert item.text == "the woman reads" and item.group == "ann-marie"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "prompts_and_classes.txt").unlink(), "no prompts_and_classes.txt"),
        (lambda folder: write(folder, ""), "names no subject"),
        (lambda folder: write(folder, "\nnothing"), "line 2: nothing: a subject and"),
        (lambda folder: write(folder, "mug,mug\nmug,cat"), "line 2: mug,cat: a subject and"),
        (lambda folder: write(folder, "../mug,mug"), "line 1: ../mug,mug: a subject and"),
        (lambda folder: write(folder, "mug,mug\n"), "a list of prompts of objects"),
        (lambda folder: add(folder, prompt("a {0} {1} and {2}")), "and .2.'.*a prompt is wanted"),
        (lambda folder: add(folder, prompt("a picture")), "a prompt is wanted"),
        (lambda folder: add(folder, "a cat on grass"), "line 23: a cat on grass: a prompt is wanted"),
        (lambda folder: [p.unlink() for p in (folder / "mug").iterdir()], "mug: no photographs"),
    ],
)
def test_a_folder_of_another_kind_is_told(tmp_path, spoil, said):
    from tests.train.benchmark.folders import write_dreambench

    folder = write_dreambench(tmp_path / "data", photographs=1)
    spoil(folder)
    with pytest.raises(RunError, match=said):
        dreambench_of(folder)


def pair(*prompts: str) -> str:
    return json.dumps({"pairs": [{"references": ["mug/00.jpg", "cat/00.jpg"], "prompts": prompts}]})


def test_prompts_of_pairs_name_their_nouns_in_any_case(dreambench, tmp_path):
    (tmp_path / "pairs.json").write_text(pair("Mug and a CAT in a cathedral"))
    (item,) = dreambench_pairs(tmp_path / "pairs.json", dreambench, 1).items
    assert item.template == "{} and a {} in a cathedral" and item.text == "Mug and a CAT in a cathedral"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "no list of pairs"),
        ('{"pairs": [{"references": ["mug/00.jpg"], "prompts": ["a mug"]}]}', "has two references"),
        ('{"pairs": [{"references": ["mug/00.jpg", "cat/09.jpg"], "prompts": ["a mug"]}]}', "cat/09.jpg is not there"),
        ('{"pairs": []}', "names no pairs"),
        ('{"pairs": [' + ", ".join([pair("a mug, a cat")[11:-2]] * 2) + "]}", r"mug\+cat is there twice"),
        (pair("a mug and a cathedral"), "'a mug and a cathedral' does not name its cat"),
    ],
)
def test_a_file_of_pairs_that_cannot_be_is_told(dreambench, tmp_path, text, said):
    (tmp_path / "pairs.json").write_text(text)
    with pytest.raises(RunError, match=said):
        dreambench_pairs(tmp_path / "pairs.json", dreambench, 1)
