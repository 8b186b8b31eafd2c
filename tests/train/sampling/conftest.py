"""A small trained model, and a folder of pictures to draw with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.model.conftest import clip, sd1, sd2
from tests.train.datasets import write_dataset
from tests.train.training import training_recipe
from toyworld.render import Scene, render_scene, sample_identity
from train.trainer.launch import train

__all__ = ["clip", "sd1", "sd2"]


@pytest.fixture(scope="session")
def run(sd1, clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling")
    recipe = training_recipe(sd1, clip, write_dataset(folder / "dataset", (6,)), optimizer={"steps": 3})
    assert train(recipe, folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def scene() -> Scene:
    """A picture of a mug and a fish that no toy model was trained on; the mug is the smaller one."""
    identities = [sample_identity("mug", 1, "heldout"), sample_identity("fish", 2, "heldout")]
    return render_scene(3, size=192, split="heldout", identities=identities)


@pytest.fixture
def pictures(tmp_path: Path, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a mug, three ways of saying where it is, a fish, and a scene with both."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:25, 20:35] = 255
    cutout = Image.fromarray(np.dstack([pixels, mask]))
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mug-mask.png")
    Image.new("L", (40, 30)).save(tmp_path / "empty.png")
    cutout.save(tmp_path / "mug.png")
    cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mug-back.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # seen upright when turned by 90 degrees clockwise
    cutout.rotate(90, expand=True).save(tmp_path / "mug-turned.png", exif=turned)
    fish = Image.new("RGBA", (20, 20))
    fish.paste("orange", (2, 6, 18, 14))
    fish.save(tmp_path / "fish.png")
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "cut-short.png").write_bytes((tmp_path / "photo.png").read_bytes()[:900])
    monkeypatch.chdir(tmp_path)
    return tmp_path
