"""Pairs within a clip. A frame's nearest neighbors are the frames right before and after it, which teach nothing; so
each clip is also searched by itself, for what comes again later."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from datapipe.pairs.embed import read_embeddings
from datapipe.pairs.files import Entities
from datapipe.pairs.search import Neighbors, Vectors, nearest, together
from datapipe.pairs.settings import SearchSettings
from datapipe.shards import Store

_SHARDS_AT_ONCE = 4
"""Whose embeddings are held: frames of a clip come one after another."""
_CELLS_AT_ONCE = 1 << 24
"""Cosines that are held: 64 MB."""
_NONE = Neighbors(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int16))


def clip_neighbors(folder: Store, entities: Entities, settings: SearchSettings, min_seconds: float) -> Neighbors:
    """The nearest entities of each in other frames of its clip, so many seconds away at least. Clips are compared
    exactly: they are short."""

    @functools.lru_cache(_SHARDS_AT_ONCE)
    def embeddings(shard: int) -> Vectors:
        return read_embeddings(folder, shard).astype(np.float32)

    found = [_NONE]
    for rows in entities_by_clip(entities):
        every = np.empty((len(rows), 0), np.float32)
        for shard in np.unique(entities.shard[rows]).tolist():
            here = entities.shard[rows] == shard
            vectors = embeddings(shard)[rows[here] - np.searchsorted(entities.shard, shard)]
            every = every if every.shape[1] else np.empty((len(rows), vectors.shape[1]), np.float32)
            every[here] = vectors
        found += _within(rows, every, entities.time_s[rows], settings, min_seconds)
    return together(found)


def entities_by_clip(entities: Entities) -> list[NDArray[np.int64]]:
    """Numbers of the entities of each clip, clips in the order of the dataset."""
    rows = np.flatnonzero(entities.clip != "")
    _, first, clip = np.unique(entities.clip[rows].astype(str), return_index=True, return_inverse=True)
    order = np.argsort(first[clip], kind="stable")
    return [part for part in np.split(rows[order], np.flatnonzero(np.diff(first[clip][order])) + 1) if len(part)]


def _within(
    rows: NDArray[np.int64], every: Vectors, time_s: NDArray[np.float64], settings: SearchSettings, min_seconds: float
) -> Iterator[Neighbors]:
    """Neighbors within one clip, some rows at a time. rows: (N,); every: (N, D), embeddings; time_s: (N,)."""
    at_once = max(1, _CELLS_AT_ONCE // len(rows))
    most = min(settings.neighbors, len(rows))
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        cosine = every[some] @ every.T
        far = np.abs(time_s[some, None] - time_s) >= min_seconds
        cosine[~far | (rows[some, None] == rows)] = -np.inf
        neighbor = np.argpartition(cosine, -most, axis=1)[:, -most:]
        similarity = np.take_along_axis(cosine, neighbor, axis=1)
        of, rank = np.nonzero(similarity >= settings.floor)
        yield nearest(rows[some][of], rows[neighbor[of, rank]], similarity[of, rank], settings.neighbors)
