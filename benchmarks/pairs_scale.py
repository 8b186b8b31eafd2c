"""What the search for pairs takes as datasets grow: `python benchmarks/pairs_scale.py [--entities 100000 1000000]
[--dims 96] [--threads 2]`.

Embeddings of so many entities, every one of an identity of five, are put into files of 10,000 as `sdd pairs` leaves
them. CPU seconds, wall clock and peak memory of: training and searching the index, in parts of `search.part_entities`;
joining what the parts found into candidates; and the verdicts and identities. Recall: the share of an exact search's
neighbors above the floor that is found, of 1,000 entities. The features themselves and the scores of candidates are
left out.
"""

from __future__ import annotations

import argparse
import functools
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import faiss
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from datapipe.pairs.clusters import find_identities
from datapipe.pairs.decide import Scores, decide
from datapipe.pairs.embed import Halves, embeddings_name, read_embeddings
from datapipe.pairs.files import Entities, put_table
from datapipe.pairs.scores import Candidates, candidates, copy_bits
from datapipe.pairs.search import (
    Neighbors,
    joined,
    lists_for,
    nearest,
    parts_of,
    search_part,
    train_index,
    training_sample,
)
from datapipe.pairs.settings import DecideSettings, SearchSettings
from datapipe.shards import Store

OF_A_FILE = 10_000
OF_AN_IDENTITY = 5
SPREAD = 0.45
"""Length of the noise that is added to an identity's vector, of length 1: cosines of about 0.83 within it."""
CHECKED = 1_000

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entities", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dims", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(arguments.threads)
    console = Console()
    for entities in arguments.entities:
        with tempfile.TemporaryDirectory() as folder:
            console.print(measured(Store(folder), entities, arguments.dims))


def measured(folder: Store, entities: int, dims: int) -> Table:
    table = Table("step", "CPU s", "wall s", title=f"{entities:,} entities of {dims} dimensions", title_justify="left")

    def timed(what: str, work: Callable[[], T]) -> T:
        cpu, wall = time.process_time(), time.monotonic()
        found = work()
        table.add_row(what, f"{time.process_time() - cpu:.1f}", f"{time.monotonic() - wall:.1f}")
        return found

    write_embeddings(folder, entities, dims)
    settings = SearchSettings()
    shards = [(number, number * OF_A_FILE) for number in range(-(-entities // OF_A_FILE))]
    lists = lists_for(settings, entities)
    names = [shard for shard, _ in shards]
    sample = timed(
        "read the training sample",
        lambda: training_sample(folder, names, entities, lists, np.random.default_rng(0)),
    )
    index = timed(f"train {lists:,} lists", lambda: train_index(sample, lists))
    trained = faiss.serialize_index(index).tobytes()
    parts = []
    for number, part in enumerate(parts_of(shards, entities, settings.part_entities)):
        work = functools.partial(search_part, folder, trained, part, shards, settings)
        parts.append(timed(f"index and search, part {number + 1}", functools.partial(_listed, work)))
    found = timed("join", lambda: joined([n for part in parts for n in part], settings.neighbors))
    pairs = timed("candidates", lambda: candidates(found, entities))
    decided = timed("verdicts and identities", lambda: verdicts(entities, pairs))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    table.caption = (
        f"{len(pairs):,} candidates, {decided:,} pairs; recall {recall(folder, shards, found, settings):.3f}; "
        f"peak {peak:.2f} GB"
    )
    return table


def _listed(work: Callable[[], Iterator[Neighbors]]) -> list[Neighbors]:
    return list(work())


def vectors(first: int, count: int, dims: int) -> Halves:
    """Embeddings of the entities of a file, from entity `first` on: those of an identity lie in five files."""
    center = np.random.default_rng((0, first // OF_A_FILE // OF_AN_IDENTITY)).standard_normal((count, dims), np.float32)
    center /= np.linalg.norm(center, axis=1, keepdims=True)
    noise = np.random.default_rng((1, first)).standard_normal((count, dims), np.float32)
    every = center + SPREAD * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    halves: Halves = (every / np.linalg.norm(every, axis=1, keepdims=True)).astype(np.float16)
    return halves


def write_embeddings(folder: Store, entities: int, dims: int) -> None:
    for number, first in enumerate(range(0, entities, OF_A_FILE)):
        every = vectors(first, min(OF_A_FILE, entities - first), dims)
        offsets = pa.array(np.arange(0, every.size + 1, dims), pa.int32())
        column = pa.ListArray.from_arrays(offsets, pa.array(every.ravel()))
        put_table(folder, embeddings_name(number), pa.table({"embedding": column}), "benchmark")


def verdicts(entities: int, pairs: Candidates) -> int:
    """How many candidates are pairs, with the cosines of embeddings in place of those of patches."""
    row = np.arange(entities)
    phash = np.random.default_rng(0).integers(0, 1 << 63, entities).astype(np.uint64)
    mug, clip, time_s = np.full(entities, "mug", object), np.full(entities, "", object), np.full(entities, np.nan)
    every = Entities(row.astype(np.int32), row, np.zeros(entities, np.int32), phash, mug, clip, time_s)
    score = pairs.similarity
    nothing = np.full_like(score, np.nan)
    scores = Scores(score, np.zeros_like(score), copy_bits(every, pairs), nothing)
    settings = DecideSettings()
    decision = decide(pairs, scores, every, np.zeros(entities, bool), settings)
    return int((find_identities(pairs, scores, decision, every, settings).rejected == 0).sum())


def recall(folder: Store, shards: Sequence[tuple[int, int]], found: Neighbors, settings: SearchSettings) -> float:
    asked = read_embeddings(folder, 0)[:CHECKED].astype(np.float32)
    exact = []
    for shard, first in shards:
        every = read_embeddings(folder, shard).astype(np.float32)
        cosine = asked @ every.T
        of, other = np.nonzero(cosine >= settings.floor)
        other_is_new = of != other + first
        exact.append((of[other_is_new], other[other_is_new] + first, cosine[of, other][other_is_new]))
    of, other, cosine = (np.concatenate(column) for column in zip(*exact, strict=True))
    wanted = nearest(of, other, cosine, settings.neighbors)
    have = set(zip(found.of.tolist(), found.neighbor.tolist(), strict=True))
    pairs = list(zip(wanted.of.tolist(), wanted.neighbor.tolist(), strict=True))
    return sum(pair in have for pair in pairs) / len(pairs)


if __name__ == "__main__":
    main()
