"""What runs inside Ray's actors: a shard, a part of the index or a part of the candidates comes in, and a file of the
folder `pairs/` comes out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import faiss
import numpy as np
from numpy.typing import NDArray

from datapipe.backends.patch_features import PatchFeatures
from datapipe.pairs.embed import PatchReader, embed_shard
from datapipe.pairs.files import put_table
from datapipe.pairs.placing import Row
from datapipe.pairs.scores import Floats, aligned, patch_similarity, scores_name, scores_table
from datapipe.pairs.search import joined, put_neighbors, search_part
from datapipe.pairs.settings import EmbedSettings, SearchSettings
from datapipe.shards import Store, read_manifest
from datapipe.workers import use_one_thread

_PAIRS_AT_ONCE = 2_000


class EmbedWorker:
    def __init__(self, dataset: str, folder: str, settings: EmbedSettings) -> None:
        use_one_thread()
        self.dataset, self.folder, self.model = Store(dataset), Store(folder), PatchFeatures(settings, settings.grid)

    def __call__(self, row: Row) -> Row:
        manifest = read_manifest(self.dataset, "shard", row["shard"])
        embed_shard(self.dataset, self.folder, manifest, self.model, row["made_from"])
        return {"shard": row["shard"]}


class SearchWorker:
    def __init__(
        self,
        folder: str,
        parts: Sequence[Sequence[tuple[int, int]]],
        every: Sequence[tuple[int, int]],
        settings: SearchSettings,
        trained: bytes,
    ) -> None:
        faiss.omp_set_num_threads(os.cpu_count() or 1)  # Ray allows it a part of the node's cores otherwise
        self.folder, self.parts, self.every = Store(folder), parts, every
        self.settings, self.trained = settings, trained

    def __call__(self, row: Row) -> Row:
        part = row["part"]
        found = list(search_part(self.folder, self.trained, self.parts[part], self.every, self.settings))
        put_neighbors(self.folder, part, joined(found, self.settings.neighbors), row["made_from"])
        return {"part": part}


class ScoreWorker:
    def __init__(self, folder: str, grid: int) -> None:
        self.folder, self.patches = Store(folder), PatchReader(Store(folder), grid)

    def __call__(self, row: Row) -> Row:
        asked = np.frombuffer(row["asked"], np.int64).reshape(4, -1)
        put_table(self.folder, scores_name(row["part"]), scores_table(list(self._scores(asked))), row["made_from"])
        return {"part": row["part"]}

    def _scores(self, asked: NDArray[np.int64]) -> Iterator[tuple[Floats, Floats]]:
        """asked: (4, E) shard of a, its position there, shard of b, its position."""
        for start in range(0, asked.shape[1], _PAIRS_AT_ONCE):
            shard_a, a, shard_b, b = asked[:, start : start + _PAIRS_AT_ONCE].tolist()
            one, other = self.patches(shard_a, a), self.patches(shard_b, b)
            yield patch_similarity(one, other), aligned(one, other)
