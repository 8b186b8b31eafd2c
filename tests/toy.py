"""Toy images in a folder, and runs over them as a user starts them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from datapipe.shards import Store
from toyworld.render.web import render_web_image

PROJECT = Path(__file__).parents[1]
TOY_RECIPE = PROJECT / "manifests/recipes/toy.yaml"


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    """The first images of a toy web, as files; those with a dead URL are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(count):
        image = render_web_image(row, count, seed)
        if image.jpeg is not None:
            (folder / f"{row:04d}.jpg").write_bytes(image.jpeg)
            (folder / f"{row:04d}.txt").write_text(image.alt_text)


def write_recipe(path: Path, **blocks: object) -> Path:
    """The toy recipe with some blocks changed, key by key."""
    tree = yaml.safe_load(TOY_RECIPE.read_text())
    for name, block in blocks.items():
        tree[name] = {**tree.get(name, {}), **block} if isinstance(block, dict) else block
    path.write_text(yaml.safe_dump(tree))
    return path


def command(recipe: Path, source: Path | None, out: Path | str, *more: str) -> list[str]:
    named = [] if source is None else ["--input", str(source)]
    return [sys.executable, "-m", "sdd", "dataset", "--recipe", str(recipe), *named, "--out", str(out), *more]


def run(
    recipe: Path, source: Path | None, out: Path | str, *more: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`sdd dataset` in a process of its own."""
    return subprocess.run(
        command(recipe, source, out, *more), cwd=PROJECT, env=env, capture_output=True, text=True, check=False
    )


def digests(out: Path, endings: Iterable[str] = (".tar", ".parquet", ".json")) -> dict[str, str]:
    """SHA-256 of every file of the dataset, by name; temporary and lock files count as files that must not be there."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.iterdir())
        if path.suffix in tuple(endings) or ".tmp-" in path.name
    }


MADE_IMAGES = 120
MADE_PORT = 20_000 + 2 * (zlib.crc32(str(PROJECT).encode()) % 5_000)
"""The toy web's own in each checkout, below the ephemeral ports: the tests of two checkouts may run side by side."""
MADE_SELECT: dict[str, object] = {"min_score": 0.88, "min_entities": 2}
"""Selection of the dataset that tests look into: strict, so that there are images lost at selection too."""


@dataclass(frozen=True)
class Made:
    """`folder`: of the dataset; `truth`: the table that the toy web was drawn from."""

    folder: Path
    truth: Path

    @property
    def store(self) -> Store:
        return Store(str(self.folder))


def make(folder: Path, select: dict[str, object]) -> None:
    """A full run over the toy web with these settings of selection."""
    recipe = write_recipe(
        folder.with_suffix(".yaml"), toyworld={"images": MADE_IMAGES, "port": MADE_PORT}, slice_rows=40, select=select
    )
    done = run(recipe, None, folder)
    assert done.returncode == 0, done.stderr
