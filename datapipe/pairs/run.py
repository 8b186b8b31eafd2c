"""A whole search: committed shards -> embeddings -> neighbors -> scores -> pairs and identities. Each step is resumed
where it was; a change of `decide.*` does only the last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from datapipe.backends.loading import check_model, model_identity, pinned
from datapipe.backends.patch_features import KINDS
from datapipe.pairs.clips import clip_neighbors
from datapipe.pairs.clusters import find_identities
from datapipe.pairs.decide import Scores, decide
from datapipe.pairs.embed import embedding_fingerprint, embeddings_name, read_entities
from datapipe.pairs.exclude import excluded_entities, hashes_to_exclude, keep_hashes
from datapipe.pairs.files import FOLDER, SETTINGS_FILE, Entities, fingerprint, is_made_from, read_table
from datapipe.pairs.placing import Placing, Row, ray_when_needed
from datapipe.pairs.scores import Candidates, candidates, copy_bits, scores_name, seconds_apart
from datapipe.pairs.search import (
    Neighbors,
    joined,
    lists_for,
    neighbors_name,
    parts_of,
    read_neighbors,
    together,
    train_index,
    training_sample,
)
from datapipe.pairs.settings import PairSettings
from datapipe.pairs.workers import EmbedWorker, ScoreWorker, SearchWorker
from datapipe.pairs.write import Found, check_given, write_found
from datapipe.shards import Manifest, Store, manifests
from subject_diffusion.errors import ShardError

PAIRS_PER_PART = 200_000
"""Candidates whose scores are one file."""


def find_pairs(store: Store, settings: PairSettings, address: str | None = None, exclude: str | None = None) -> Found:
    """Writes the dataset's pairs and identities. Raises SddError, where possible before any work.

    address: a Ray cluster's; default: Ray starts in this process. exclude: a folder of images whose copies are kept
    out; default: those of the last search.
    """
    shards = list(manifests(store, "shard"))
    if not shards:
        raise ShardError(f"{store.root}: no shards here; `sdd dataset --out {store.root}` makes them")
    check_model(settings.embed, KINDS, processor=True)
    kept_out = hashes_to_exclude(store, exclude)
    check_given(store)
    settings = settings.model_copy(update={"embed": pinned(settings.embed)})
    with store.lock():
        folder = Store(f"{store.root}/{FOLDER}")
        folder.clear_temporaries()
        folder.put(SETTINGS_FILE, settings.model_dump_json(indent=1, exclude_defaults=True).encode())
        keep_hashes(folder, kept_out)
        search = _Search(store, folder, settings, shards, address)
        entities, pairs, scores = search.measured()
        excluded = excluded_entities(entities, kept_out, settings.decide.min_copy_bits)
        decision = decide(pairs, scores, entities, excluded, settings.decide)
        identities = find_identities(pairs, scores, decision, entities, settings.decide)
        return write_found(store, entities, pairs, scores, decision, identities)


@dataclass(frozen=True)
class _Search:
    """The steps that read features. shards: of the dataset; address: of the Ray cluster that makes what is missing."""

    dataset: Store
    folder: Store
    settings: PairSettings
    shards: Sequence[Manifest]
    address: str | None

    def measured(self) -> tuple[Entities, Candidates, Scores]:
        """The entities, the candidates and all that is known of these, once everything is there."""
        model = model_identity(self.settings.embed)
        made_from = {m.index: embedding_fingerprint(self.settings.embed, model, m) for m in self.shards}
        with ray_when_needed(self.address, self.settings.workers) as ray:
            self._embed(made_from, ray)
            entities = Entities.joined([read_entities(self.folder, m.index) for m in self.shards])
            if not len(entities):
                raise ShardError(f"{self.dataset.root}: no kept image has an entity with a mask, to be compared by")
            found = self._neighbors(entities, made_from, ray)
            in_clips = clip_neighbors(self.folder, entities, self.settings.search, self.settings.decide.min_seconds)
            pairs = candidates(together([found, in_clips]), len(entities))
            return entities, pairs, self._scores(entities, pairs, made_from, ray)

    def _embed(self, made_from: Mapping[int, str], ray: Placing) -> None:
        stale = [i for i, made in made_from.items() if not is_made_from(self.folder, embeddings_name(i), made)]
        rows: list[Row] = [{"shard": i, "made_from": made_from[i]} for i in stale]
        ray.map(
            "embeddings of shards", EmbedWorker, rows, needs_gpu=True,
            dataset=self.dataset.url, folder=self.folder.url, settings=self.settings.embed,
        )  # fmt: skip

    def _neighbors(self, entities: Entities, made_from: Mapping[int, str], ray: Placing) -> Neighbors:
        search = self.settings.search
        first = np.searchsorted(entities.shard, list(made_from)).tolist()
        every = list(zip(made_from, first, strict=True))
        parts = parts_of(every, len(entities), search.part_entities)
        made = [fingerprint(embeddings=made_from, part=p, search=search.model_dump()) for p in parts]
        stale = [i for i, m in enumerate(made) if not is_made_from(self.folder, neighbors_name(i), m)]
        if stale:
            lists = lists_for(search, min(len(entities), search.part_entities))
            sample = training_sample(self.folder, list(made_from), len(entities), lists, np.random.default_rng(0))
            ray.map(
                "neighbors in parts of the index", SearchWorker, [{"part": i, "made_from": made[i]} for i in stale],
                whole_nodes=True, folder=self.folder.url, parts=parts, every=every, settings=search,
                trained=faiss.serialize_index(train_index(sample, lists)).tobytes(),
            )  # fmt: skip
        return joined([read_neighbors(self.folder, i) for i in range(len(parts))], search.neighbors)

    def _scores(self, entities: Entities, pairs: Candidates, made_from: Mapping[int, str], ray: Placing) -> Scores:
        position = np.arange(len(entities)) - np.searchsorted(entities.shard, entities.shard)
        starts = range(0, len(pairs), PAIRS_PER_PART)
        rows: list[Row] = []
        for number, start in enumerate(starts):
            part = pairs.part(slice(start, start + PAIRS_PER_PART))
            places = [(entities.shard[ends], position[ends]) for ends in (part.a, part.b)]
            asked = np.stack([column for place in places for column in place]).astype(np.int64).tobytes()
            made = fingerprint(embeddings=made_from, asked=hashlib.sha256(asked).hexdigest())
            if not is_made_from(self.folder, scores_name(number), made):
                rows.append({"part": number, "asked": asked, "made_from": made})
        ray.map("scores of candidates", ScoreWorker, rows, folder=self.folder.url, grid=self.settings.embed.grid)
        tables = [read_table(self.folder, scores_name(i)) for i in range(len(starts))]
        similarity, same_place = (
            np.concatenate([np.empty(0, np.float32), *(t[name].to_numpy() for t in tables)])
            for name in ("patch_similarity", "aligned")
        )
        return Scores(similarity, same_place, copy_bits(entities, pairs), seconds_apart(entities, pairs.a, pairs.b))
