"""The nearest entities of each entity, by the cosine of their embeddings: faiss's inverted lists, in parts that share
their centroids, so that no worker holds more than a part and never are all pairs compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datapipe.pairs.embed import read_embeddings
from datapipe.pairs.files import put_table, read_table
from datapipe.pairs.settings import SearchSettings
from datapipe.shards import Store

EXACT_BELOW = 10_000
"""Entities that are searched one by one: there is nothing to be gained."""
_POINTS_PER_LIST = 40
"""Points of the sample that centroids are trained on; faiss asks for 39 at least."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Neighbors:
    """E directed edges. of, neighbor: (E,) int64 numbers of entities; similarity: (E,) float32; rank: (E,) int16, from
    1, which of the entity's neighbors it is."""

    of: NDArray[np.int64]
    neighbor: NDArray[np.int64]
    similarity: NDArray[np.float32]
    rank: NDArray[np.int16]


def lists_for(settings: SearchSettings, entities: int) -> int:
    """entities: of a part of the index."""
    if settings.lists is not None:
        return min(settings.lists, max(1, entities // _POINTS_PER_LIST))
    return 1 if entities < EXACT_BELOW else round(4 * math.sqrt(entities))


def train_index(sample: Vectors, lists: int, seed: int = 0) -> Any:
    """An empty index of inner products with `lists` centroids. sample: (N, D) of length 1."""
    index: Any = faiss.index_factory(sample.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.by_residual = False  # a residual takes time, and is for codes of fewer bits
    index.cp.seed, index.cp.spherical = seed, True
    index.train(sample)
    return index


def training_sample(
    folder: Store, shards: Sequence[int], entities: int, lists: int, rng: np.random.Generator
) -> Vectors:
    """Embeddings of as many entities as the centroids need, the same share of each shard."""
    share = min(1.0, _POINTS_PER_LIST * lists / max(entities, 1))
    parts = []
    for shard in shards:
        embeddings = read_embeddings(folder, shard)
        count = math.ceil(share * len(embeddings))
        parts.append(embeddings[np.sort(rng.choice(len(embeddings), count, replace=False))])
    return np.concatenate([p for p in parts if len(p)]).astype(np.float32)


def search(index: Any, queries: Vectors, first: int, settings: SearchSettings) -> Neighbors:
    """The nearest of an index's entities of each query, above the floor, the query itself left out. first: number of
    the first query; those of the index are its ids."""
    index.nprobe = settings.probes
    similarity, neighbor = index.search(queries, settings.neighbors + 1)
    of = np.arange(first, first + len(queries))[:, None]
    good = (neighbor >= 0) & (neighbor != of) & (similarity >= settings.floor)
    edges = np.broadcast_to(of, neighbor.shape)[good], neighbor[good], similarity[good]
    return nearest(*edges, settings.neighbors)


def nearest(
    of: NDArray[np.int64], neighbor: NDArray[np.int64], similarity: NDArray[np.float32], most: int
) -> Neighbors:
    """The `most` nearest of the neighbors that were found of each entity, ranked; equally near ones in their order."""
    order = np.lexsort((neighbor, -similarity, of))
    of, neighbor, similarity = of[order], neighbor[order], similarity[order]
    rank = np.arange(len(of)) - np.searchsorted(of, of) + 1
    kept = rank <= most
    return Neighbors(of[kept], neighbor[kept], similarity[kept], rank[kept].astype(np.int16))


def parts_of(every: Sequence[tuple[int, int]], entities: int, part_entities: int) -> list[list[tuple[int, int]]]:
    """Cuts (shard, number of its first entity) into parts of so many entities, or of one shard that has more."""
    parts: list[list[tuple[int, int]]] = []
    begins = 0
    for (shard, first), (_, after) in zip(every, [*every[1:], (0, entities)], strict=True):
        if not parts or after - begins > part_entities:
            parts.append([])
            begins = first
        parts[-1].append((shard, first))
    return parts


def neighbors_name(part: int) -> str:
    """The table of the neighbors that were found in a part of the index."""
    return f"neighbors-{part:04d}.parquet"


def search_part(
    folder: Store,
    trained: bytes,
    part: Sequence[tuple[int, int]],
    every: Sequence[tuple[int, int]],
    settings: SearchSettings,
) -> Iterator[Neighbors]:
    """For the entities of one shard after another their neighbors in a part of the index.

    trained: an empty index, serialized; part, every: (shard, number of its first entity), of the part and of all.
    """
    index = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
    for shard, first in part:
        embeddings = read_embeddings(folder, shard)
        if len(embeddings):
            index.add_with_ids(embeddings.astype(np.float32), np.arange(first, first + len(embeddings)))
    for shard, first in every:
        embeddings = read_embeddings(folder, shard)
        if len(embeddings):
            yield search(index, embeddings.astype(np.float32), first, settings)


def put_neighbors(folder: Store, part: int, found: Neighbors, made_from: str) -> None:
    columns = {"of": found.of, "neighbor": found.neighbor, "similarity": found.similarity}
    put_table(folder, neighbors_name(part), pa.table(columns), made_from)


def read_neighbors(folder: Store, part: int) -> Neighbors:
    """Raises ShardError."""
    table = read_table(folder, neighbors_name(part))
    of, neighbor, similarity = (table[name].to_numpy() for name in ("of", "neighbor", "similarity"))
    return nearest(of, neighbor, similarity, len(of))


def joined(parts: Sequence[Neighbors], most: int) -> Neighbors:
    """The nearest among those that were found in several parts, or for several shards."""
    every = together(parts)
    return nearest(every.of, every.neighbor, every.similarity, most)


def together(parts: Sequence[Neighbors]) -> Neighbors:
    """All edges, as they are ranked."""
    return Neighbors(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Neighbors)))
