"""Decontamination: what a model will be judged by is kept out of what it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datapipe.decoding import decode_rgb
from datapipe.pairs.files import Entities
from datapipe.stages.screen import perceptual_hash
from subject_diffusion.errors import RunError

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
_HASHES_AT_ONCE = 1 << 20


def excluded_entities(entities: Entities, hashes: Sequence[int], min_copy_bits: int) -> NDArray[np.bool_]:
    """(N,) bool: the entities whose image has a perceptual hash that differs from one of these in fewer bits."""
    excluded = np.zeros(len(entities), bool)
    for phash in hashes:
        for start in range(0, len(entities), _HASHES_AT_ONCE):
            some = slice(start, start + _HASHES_AT_ONCE)
            excluded[some] |= np.bitwise_count(entities.phash[some] ^ np.uint64(phash)) < min_copy_bits
    return excluded


def hashes_below(folder: Path) -> list[int]:
    """Perceptual hashes of the images of a folder and its subfolders, each once. Raises RunError."""
    if not folder.is_dir():
        raise RunError(f"--exclude {folder}: no such folder; name one with the images that are to be kept out")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise RunError(f"--exclude {folder}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    found = set()
    for file in files:
        try:
            found.add(perceptual_hash(decode_rgb(file.read_bytes())))
        except (OSError, ValueError) as error:
            raise RunError(
                f"--exclude {file}: cannot be read: {error}; an image that is not seen is not kept out"
            ) from None
    return sorted(found)
