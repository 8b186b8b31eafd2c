"""Scenes of the toy world as cases of an evaluation, without a dataset."""

from __future__ import annotations

from PIL import Image

from model import Subject
from toyworld.render import Scene
from train.evaluation.cases import Case


def case_of(scene: Scene) -> Case:
    image = Image.fromarray(scene.image)
    subjects = []
    for s in scene.subjects:
        x1, y1, x2, y2 = (v / image.width for v in s.box)
        subjects.append(Subject(image, s.tag, mask=s.mask, box=(x1, y1, x2, y2)))
    names = tuple(("the toy world", repr(s.identity), 0) for s in scene.subjects)
    return Case(image, scene.caption, tuple(subjects), names)
