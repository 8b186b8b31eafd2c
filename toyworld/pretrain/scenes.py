"""Training data: scenes of `toyworld.render`, drawn once into files that every training maps into memory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import toyworld.render
from subject_diffusion.storage import whole_folder
from toyworld.render import NOUNS, render_scene

Split = Literal["train", "heldout"]

CACHE = Path("out/pretrain")
MOST = 4  # subjects in a scene, at most


@dataclass(frozen=True)
class SceneSet:
    """N scenes of one size; scene i is `render_scene(i)`. Arrays are memory-mapped and must not be written to.

    images: (N, H, W, 3) uint8. boxes: (N, MOST, 4) float32, xyxy in pixels, NaN in unused rows.
    nouns: (N, MOST) int16, index into NOUNS, -1 in unused rows. counts: (N,) int16.
    packed_masks: (N, MOST, H, W / 8) uint8, see `masks`.
    """

    images: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    nouns: NDArray[np.int16]
    counts: NDArray[np.int16]
    packed_masks: NDArray[np.uint8]
    captions: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def masks(self, indices: NDArray[np.integer]) -> NDArray[np.uint8]:
        """(B, MOST, H, W) uint8 in {0, 1}: the visible pixels of every subject of the scenes at `indices` (B,)."""
        return np.unpackbits(self.packed_masks[indices], axis=-1)


def load_scenes(
    count: int, split: Split = "train", *, size: int = 128, cache: Path = CACHE, processes: int = 2
) -> SceneSet:
    """Scenes with seeds 0 … count - 1, drawn on the first call. A second process that asks meanwhile waits for them."""
    folder = cache / f"scenes-{split}-{_fingerprint(count, split, size)}"
    cache.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _draw(folder, count, split, size, processes)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _shapes(count, size)}
    return SceneSet(captions=json.loads((folder / "captions.json").read_text()), **arrays)


def _fingerprint(count: int, split: Split, size: int) -> str:
    """Changes with the arguments and with the renderer's source, so that a cache never outlives its drawings."""
    digest = hashlib.sha256(repr((count, split, size)).encode())
    for path in sorted(Path(toyworld.render.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _shapes(count: int, size: int) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    return {
        "images": (np.uint8, (count, size, size, 3)),
        "boxes": (np.float32, (count, MOST, 4)),
        "nouns": (np.int16, (count, MOST)),
        "counts": (np.int16, (count,)),
        "packed_masks": (np.uint8, (count, MOST, size, (size + 7) // 8)),
    }


def _draw(folder: Path, count: int, split: Split, size: int, processes: int) -> None:
    with whole_folder(folder) as draft:
        _draw_into(draft, count, split, size, processes)


def _draw_into(draft: Path, count: int, split: Split, size: int, processes: int) -> None:
    for name, (kind, shape) in _shapes(count, size).items():
        np.lib.format.open_memmap(draft / f"{name}.npy", "w+", np.dtype(kind), shape).flush()
    jobs = [(draft, range(start, min(start + 250, count)), split, size) for start in range(0, count, 250)]
    if len(jobs) <= processes:  # too few for a pool, which also needs a main module that its workers can import
        parts = [_draw_part(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.map(_draw_part, jobs, chunksize=1)
    captions = [caption for part in parts for caption in part]
    (draft / "captions.json").write_text(json.dumps(captions))


def _draw_part(job: tuple[Path, range, Split, int]) -> list[str]:
    draft, seeds, split, size = job
    arrays = {name: np.load(draft / f"{name}.npy", mmap_mode="r+") for name in _shapes(0, size)}
    captions = []
    for seed in seeds:
        scene = render_scene(seed, size=size, split=split)
        arrays["images"][seed] = scene.image
        arrays["boxes"][seed] = np.nan
        arrays["nouns"][seed] = -1
        arrays["counts"][seed] = len(scene.subjects)
        for row, subject in enumerate(scene.subjects):
            arrays["boxes"][seed, row] = subject.box
            arrays["nouns"][seed, row] = NOUNS.index(subject.tag)
            arrays["packed_masks"][seed, row] = np.packbits(subject.mask, axis=-1)
        captions.append(scene.caption)
    return captions
