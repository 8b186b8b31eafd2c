"""Draws the pictures beside this file: subjects of the toy world that no toy model was trained on, cut out.

python examples/references/make.py
"""

from pathlib import Path

import numpy as np
from PIL import Image

from toyworld.render import render_scene, sample_identity

SUBJECTS = {"fish": 3, "mug": 1, "robot": 2, "teapot": 4}
"""Noun -> which of its held-out individuals."""
SIZE_PX = 256


def cutout(noun: str, index: int) -> Image.Image:
    """The individual, transparent where it is not."""
    scene = render_scene(index, size=SIZE_PX, identities=[sample_identity(noun, index, "heldout")])
    subject = scene.subjects[0]
    alpha = (np.asarray(subject.mask) * 255).astype(np.uint8)
    return Image.fromarray(np.dstack([scene.image, alpha])).crop(Image.fromarray(alpha).getbbox())


if __name__ == "__main__":
    for noun, index in SUBJECTS.items():
        cutout(noun, index).save(Path(__file__).with_name(f"{noun}.png"))
