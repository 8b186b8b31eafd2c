"""A shard's entities as features: one mean over the mask, to be searched by, and means over a grid, to be compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from datapipe.decoding import decode_rgb
from datapipe.pairs.files import Entities, fingerprint, put_table, read_table
from datapipe.pairs.settings import EmbedSettings
from datapipe.schema import Entity, Sample
from datapipe.shards import Manifest, Store, kept_of

if TYPE_CHECKING:
    from datapipe.backends.patch_features import PatchFeatures, SubjectFeatures

Halves = NDArray[np.float16]

_ENTITY_COLUMNS = ("row", "entity", "phash", "tag", "clip", "time_s")
_SHARDS_AT_ONCE = 512
"""Shards whose places of cells are held: at most 24 bytes per entity at a grid of 4."""


def embeddings_name(shard: int) -> str:
    """The table of a shard's entities, in order: who they are, their embeddings (float16), and which cells of the grid
    they cover."""
    return f"embeddings-{shard:06d}.parquet"


def patches_name(shard: int) -> str:
    """The features of those cells, one entity's after another's: float16, (all cells, D)."""
    return f"patches-{shard:06d}.f16"


def embedding_fingerprint(settings: EmbedSettings, model: str, manifest: Manifest) -> str:
    """The fingerprint of what a shard's embeddings depend on. model: its `model_identity`."""
    return fingerprint(
        model=model,
        grid=settings.grid,
        dtype=settings.dtype,
        tar=manifest.tar.sha256,
        parquet=manifest.parquet.sha256,
    )


def embed_shard(dataset: Store, folder: Store, manifest: Manifest, model: PatchFeatures, made_from: str) -> int:
    """Writes the features of a shard's entities; returns how many there are. Entities without a mask have none."""
    found: list[tuple[Sample, int, Entity, SubjectFeatures]] = []
    for sample in kept_of(dataset, manifest):
        found += _of_sample(sample, model)
    table = pa.table(
        {
            "row": pa.array([s.row for s, *_ in found], pa.int64()),
            "entity": pa.array([number for _, number, *_ in found], pa.int32()),
            "phash": pa.array([s.phash for s, *_ in found], pa.uint64()),
            "tag": pa.array([e.tag for *_, e, _ in found], pa.string()),
            "clip": pa.array([s.clip or "" for s, *_ in found], pa.string()),
            "time_s": pa.array([s.time_s for s, *_ in found], pa.float64()),
            "embedding": pa.array([f.embedding.astype(np.float16) for *_, f in found], pa.list_(pa.float16())),
            "cells": pa.array([f.cells for *_, f in found], pa.list_(pa.uint8())),
        }
    )
    patches = [f.patches.astype(np.float16) for *_, f in found]
    folder.put(patches_name(manifest.index), b"".join(p.tobytes() for p in patches))
    # Last, because it says that the shard is done.
    put_table(folder, embeddings_name(manifest.index), table, made_from)
    return len(found)


def _of_sample(sample: Sample, model: PatchFeatures) -> Iterator[tuple[Sample, int, Entity, SubjectFeatures]]:
    masked = [(n, e, e.mask.array()) for n, e in enumerate(sample.entities) if e.mask is not None]
    masked = [(n, e, mask) for n, e, mask in masked if mask.any()]
    if masked:
        assert sample.image is not None
        pixels = decode_rgb(sample.image)
        features = model([(pixels, mask) for _, _, mask in masked])
        yield from ((sample, n, e, f) for (n, e, _), f in zip(masked, features, strict=True))


def read_entities(folder: Store, shard: int) -> Entities:
    """A shard's entities."""
    table = read_table(folder, embeddings_name(shard), _ENTITY_COLUMNS)
    row, *rest = (table[name].to_numpy() for name in _ENTITY_COLUMNS)
    return Entities(np.full(len(row), shard, np.int32), row, *rest)


def read_embeddings(folder: Store, shard: int) -> Halves:
    """Embeddings of a shard's entities, (N, D), of length 1 but for rounding."""
    table = read_table(folder, embeddings_name(shard), ["embedding"])
    flat: Halves = pc.list_flatten(table["embedding"]).to_numpy()
    return flat.reshape(len(table), -1) if len(table) else np.empty((0, 0), np.float16)


@dataclass(frozen=True)
class SubjectPatches:
    """features: (N, C, D) float32 of length 1, zeros beyond an entity's cells; shown: (N, C) bool, which cells of the
    grid, row by row, it covers."""

    features: NDArray[np.float32]
    shown: NDArray[np.bool_]


class PatchReader:
    """Features of patches of any entities, read by ranges from the files of their shards."""

    def __init__(self, folder: Store, grid: int) -> None:
        self._folder, self._cells = folder, grid * grid
        self._places = functools.lru_cache(_SHARDS_AT_ONCE)(self._read_places)
        self._dims = 0  # of features, once one shard was seen

    def __call__(self, shards: Sequence[int], positions: Sequence[int]) -> SubjectPatches:
        """positions: of each entity among those of its shard."""
        if shards and not self._dims:
            self._dims = read_embeddings(self._folder, shards[0]).shape[1]
        features = np.zeros((len(shards), self._cells, self._dims), np.float32)
        shown = np.zeros((len(shards), self._cells), bool)
        # Shard by shard, so that each is looked up once, however few are held.
        for i in np.argsort(shards, kind="stable").tolist():
            cells, found = self._read(shards[i], positions[i])
            features[i, cells], shown[i, cells] = found, True
        features /= np.linalg.norm(features, axis=-1, keepdims=True).clip(min=1e-6)
        return SubjectPatches(features, shown)

    def _read(self, shard: int, position: int) -> tuple[NDArray[np.uint8], Halves]:
        cells, first = self._places(shard)
        start, stop = int(first[position]), int(first[position + 1])
        data = self._folder.read(patches_name(shard), start * 2 * self._dims, (stop - start) * 2 * self._dims)
        return cells[start:stop], np.frombuffer(data, np.float16).reshape(-1, self._dims)

    def _read_places(self, shard: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The cells of a shard's entities, one's after another's, and where each one's begin and, last, where all
        end."""
        table = read_table(self._folder, embeddings_name(shard), ["cells"])
        first = np.cumsum(np.append(0, pc.list_value_length(table["cells"]).to_numpy()))
        return pc.list_flatten(table["cells"]).to_numpy(), first
