"""Decontamination: what a model will be judged by is kept out of what it learns from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from datapipe.decoding import decode_image
from datapipe.image_file import IMAGE_SUFFIXES, ImageRefusedError
from datapipe.pairs.files import EXCLUDED_FILE, FOLDER, Entities, read_json
from datapipe.shards import Store
from datapipe.sources.tar_keys import is_clutter
from datapipe.stages.screen import perceptual_hash
from subject_diffusion.errors import RunError, one_line

_HASHES_AT_ONCE = 1 << 20
_Hash = Annotated[int, Field(ge=0, lt=1 << 64)]


def hashes_to_exclude(store: Store, exclude: str | None) -> list[int]:
    """Perceptual hashes of the images of the folder `exclude`; without one, those that the last search was given.
    Raises RunError."""
    if exclude is not None:
        return hashes_below(Path(exclude))
    name = f"{FOLDER}/{EXCLUDED_FILE}"
    return read_json(store, name, list[_Hash], "--exclude") if store.exists(name) else []


def keep_hashes(folder: Store, hashes: Sequence[int]) -> None:
    """For the next search. folder: `pairs/`."""
    folder.put(EXCLUDED_FILE, json.dumps(hashes).encode())


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
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and not is_clutter(p.relative_to(folder).as_posix())
    )
    if not files:
        raise RunError(f"--exclude {folder}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    found = set()
    for file in files:
        try:
            found.add(perceptual_hash(decode_image(file.read_bytes())))
        except (OSError, ImageRefusedError) as error:
            raise RunError(
                f"--exclude {file}: cannot be read: {one_line(error)}; an image that is not seen is not kept out"
            ) from None
    return sorted(found)
