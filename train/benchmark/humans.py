"""People, by FastComposer's protocol (Xiao et al. 2023, arXiv 2305.10431): each from one photograph, with every prompt.

The folder is laid out as DreamBench's: a folder of photographs for each person, and `prompts_and_classes.txt` with the
persons' nouns (man, woman) and one list of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from subject_diffusion.errors import RunError
from train.benchmark.dreambench import LISTS, read_subjects, read_templates
from train.benchmark.protocol import Item, Protocol, Reference, chosen


def humans(folder: Path, images_per_prompt: int, only: Sequence[str] = ()) -> Protocol:
    """Raises RunError."""
    people, (templates, _) = read_subjects(folder), read_templates(folder)
    if not templates:
        raise RunError(f"{folder / LISTS}: a list of prompts is wanted")
    items = [
        Item(name, number, text, text.replace("{}", person.noun), i, (Reference(name, person.photographs[0]),))
        for name in chosen(people, only, "person")
        for person in [people[name]]
        for number, text in enumerate(templates)
        for i in range(images_per_prompt)
    ]
    return Protocol("humans", people, tuple(items))
