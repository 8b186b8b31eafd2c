"""DreamBench, the protocol of DreamBooth (Ruiz et al. 2023): 30 subjects, 25 prompts each, 4 pictures of each prompt
there, 6 in Subject-Diffusion; and pairs of its subjects.

The folder is that of the DreamBooth dataset: `prompts_and_classes.txt`, and a folder of photographs for each subject.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datapipe.image_file import IMAGE_SUFFIXES
from model.mention import find_mention
from subject_diffusion.errors import RunError
from train.benchmark.protocol import Box, Item, Photographed, Protocol, Reference, chosen

LISTS = "prompts_and_classes.txt"
PAIRS = "dreambench_pairs.json"
LIVE = frozenset({"cat", "dog"})
"""Nouns that are asked for with the prompts of live subjects."""
LEFT: Box = (0.05, 0.15, 0.48, 0.9)
RIGHT: Box = (0.52, 0.15, 0.95, 0.9)
"""Where the two subjects of a pair are drawn and scored."""

_TEMPLATE = re.compile(r"'(.+)'\.format\(unique_token, class_token\),?")
_CLASS = re.compile(r"(?!\.)([^,/\\]+),([^,]+)")
_CLASSES = ("Classes", "subject_name,class")
_HEADING = re.compile(r"([\w ]+ )?Prompts|prompt_list ?= ?\[|\]")
_LIVE = "Live Subject Prompts"


def read_subjects(folder: Path) -> dict[str, Photographed]:
    """Every subject that the lists name, with its photographs in the order of their names. Raises RunError."""
    subjects = {}
    for number, line in _lists(folder)[0]:
        form = _CLASS.fullmatch(line)
        if form is None or form[1].strip() in subjects:
            what = "a subject and its noun are wanted, such as backpack,backpack, each subject once"
            raise RunError(f"{folder / LISTS}, line {number}: {line}: {what}")
        name, noun = form[1].strip(), form[2].strip()
        photographs = tuple(p for p in sorted((folder / name).glob("*")) if p.suffix.lower() in IMAGE_SUFFIXES)
        if not photographs:
            raise RunError(f"{folder / name}: no photographs there, and {LISTS} names that subject")
        subjects[name] = Photographed(name, noun, photographs)
    if not subjects:
        raise RunError(f"{folder / LISTS}: it names no subject; a line of each is wanted, such as backpack,backpack")
    return subjects


def read_templates(folder: Path) -> tuple[list[str], list[str]]:
    """Prompts of objects and of live subjects, {} where the noun stands. The unique token of DreamBooth's tuning is
    left out, as all do who do not tune. Raises RunError."""
    objects: list[str] = []
    live: list[str] = []
    found = objects
    for number, line in _lists(folder)[1]:
        if line == _LIVE:
            found = live
        elif not _HEADING.fullmatch(line):
            found.append(_template(line, f"{folder / LISTS}, line {number}"))
    return objects, live


def _template(line: str, where: str) -> str:
    form = _TEMPLATE.fullmatch(line)
    template = form[1].replace("{0} {1}", "{}").replace("{1}", "{}") if form else ""
    if not re.search(r"(?<!\w)\{\}(?!\w)", template) or re.search("[{}]", template.replace("{}", "")):
        raise RunError(
            f"{where}: {line}: a prompt is wanted, such as 'a {{0}} {{1}} on grass'.format(unique_token, class_token), "
            "with the noun at {1}"
        )
    return template


def dreambench(folder: Path, images_per_prompt: int, only: Sequence[str] = ()) -> Protocol:
    """Each subject from its first photograph. only: of which subjects; the others still are look-alikes. Raises
    RunError."""
    subjects, (objects, live) = read_subjects(folder), read_templates(folder)
    if not objects or not live:
        raise RunError(f"{folder / LISTS}: a list of prompts of objects and one of live subjects are wanted")
    items = [
        Item(name, number, template, template.replace("{}", noun), index, (Reference(name, shown),))
        for name in chosen(subjects, only, "subject")
        for noun, shown in [(subjects[name].noun, subjects[name].photographs[0])]
        for number, template in enumerate(live if noun in LIVE else objects)
        for index in range(images_per_prompt)
    ]
    return Protocol("dreambench", subjects, tuple(items))


def dreambench_pairs(file: Path, folder: Path, images_per_prompt: int, only: Sequence[str] = ()) -> Protocol:
    """Two subjects in a picture, the first on the left.

    file: JSON, {"pairs": [{"references": [photograph, photograph], "prompts": [...]}]}, with photographs below
    `folder`, that of `dreambench`. only: pairs by name, such as cat+dog. Raises RunError.
    """
    subjects = read_subjects(folder)
    pairs = {}
    for entry in _pairs(file):
        shown = [folder / path for path in entry["references"]]
        for photograph in shown:
            if photograph.parent.name not in subjects or not photograph.is_file():
                raise RunError(f"{file}: {photograph} is not there; the photographs are looked for in {folder}")
        name = "+".join(p.parent.name for p in shown)
        if name in pairs:
            raise RunError(f"{file}: {name} is there twice; give it one entry, with all of its prompts")
        pairs[name] = (shown, entry["prompts"])
    items = []
    for name in chosen(pairs, only, "pair"):
        shown, prompts = pairs[name]
        references = tuple(Reference(p.parent.name, p, box) for p, box in zip(shown, (LEFT, RIGHT), strict=True))
        for number, text in enumerate(prompts):
            template = text
            for photograph in shown:
                noun = find_mention(template, subjects[photograph.parent.name].noun)
                if noun is None:
                    raise RunError(
                        f"{file}: {name}: the prompt {text!r} does not name its "
                        f"{subjects[photograph.parent.name].noun}; each prompt names both subjects"
                    )
                template = template[: noun.start()] + "{}" + template[noun.end() :]
            items += [Item(name, number, template, text, i, references) for i in range(images_per_prompt)]
    return Protocol("dreambench-pairs", subjects, tuple(items))


def _lists(folder: Path) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """The lines of subjects and those from the first prompt or its heading on, with their numbers."""
    lines = [(number, line.strip()) for number, line in enumerate(_text(folder).splitlines(), 1) if line.strip()]
    subjects = list(itertools.takewhile(lambda one: not (one[1].startswith("'") or _HEADING.fullmatch(one[1])), lines))
    return [one for one in subjects if one[1] not in _CLASSES], lines[len(subjects) :]


def _text(folder: Path) -> str:
    try:
        return (folder / LISTS).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise RunError(
            f"{folder}: no {LISTS} there that can be read; --data is the folder of the DreamBooth dataset"
        ) from None


def _pairs(file: Path) -> list[dict[str, Any]]:
    try:
        tree = json.loads(file.read_text("utf-8"))
        pairs = [{"references": list(e["references"]), "prompts": list(e["prompts"])} for e in tree["pairs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{file}: no list of pairs that can be read; it is JSON in the form of {PAIRS}") from None
    for entry in pairs:
        texts = [*entry["references"], *entry["prompts"]]
        if len(entry["references"]) != 2 or not entry["prompts"] or not all(isinstance(t, str) for t in texts):
            raise RunError(f"{file}: each pair has two references and its prompts; {entry['references']} has not")
    if not pairs:
        raise RunError(f"{file}: it names no pairs")
    return pairs
