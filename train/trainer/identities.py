"""The same subject in several images of a dataset: which they are, and how to read one while another is learned.

Frames of a film, photos of a product and captured objects come with names for who is who; `datapipe.schema.IDENTITIES`
is the file that says so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from datapipe.schema import IDENTITIES
from datapipe.shards import Store, read_identities
from subject_diffusion.errors import RunError, ShardError
from subject_diffusion.storage import named_errors
from train.stream.cache import ShardCache, ShardFile, retried
from train.stream.filter import Filter
from train.stream.shard_index import open_index
from train.stream.source import Source
from train.stream.tar_sample import RawSample, parse_members

Name = tuple[str, str, int]
"""Path of the source, key of the sample, number of the entity."""


@dataclass(frozen=True)
class _Location:
    """Where a sample lies: offset and size in bytes."""

    shard: ShardFile
    offset: int
    size: int


class Pairs:
    """For every entity, those in other images that are the same subject."""

    def __init__(self, sources: Sequence[Source], cache: ShardCache) -> None:
        """Raises RunError, ShardError. Datasets without `identities.parquet` have none."""
        self._cache = cache
        self._alike: dict[Name, list[Name]] = {}
        self._locations: dict[tuple[str, str], _Location] = {}
        for path in dict.fromkeys(source.path for source in sources):
            if knows_identities(path):
                self._add(path)

    def __len__(self) -> int:
        """Entities that are in another image, too."""
        return len(self._alike)

    def fingerprint(self, source: str) -> str:
        """Hash of everything that `draw` chooses from for a source, wherever that lies. Entities of one identity share
        one list, hashed once."""
        digest = hashlib.sha256()
        groups: dict[int, int] = {}
        for name in sorted(name for name in self._alike if name[0] == source):
            alike = self._alike[name]
            shown: int | list[tuple[str, int]]
            if id(alike) in groups:
                shown = groups[id(alike)]
            else:
                groups[id(alike)], shown = len(groups), [other[1:] for other in alike]
            digest.update(json.dumps([name[1:], shown]).encode())
        return digest.hexdigest()

    def individual(self, name: Name) -> Name:
        """Who an entity is: the same name for all that are alike."""
        return self._alike.get(name, [name])[0]

    def draw(self, name: Name, rng: np.random.Generator) -> Name | None:
        """Another image's entity that is the same subject; None where the dataset knows of none."""
        alike = self._alike.get(name)
        if alike is None:
            return None
        others = [other for other in alike if other[1] != name[1]]
        return others[int(rng.integers(len(others)))]

    def read(self, name: Name) -> RawSample:
        """The sample of an entity that `draw` gave. Raises ShardError, CorruptSampleError."""
        source, key, _ = name
        location = self._locations[source, key]
        descriptor = self._cache.open(location.shard)
        try:
            data = memoryview(os.pread(descriptor, location.size, location.offset))
        finally:
            os.close(descriptor)
        found, spans = parse_members(data)
        return RawSample(found, {n: data[start:end] for n, (start, end) in spans.items()}, source=source)

    def shard(self, name: Name) -> ShardFile:
        """Where that sample lies."""
        return self._locations[name[:2]].shard

    def _add(self, path: str) -> None:
        by_identity: dict[str, list[Name]] = defaultdict(list)
        for key, entity, identity in read_identities(Store(path)):
            by_identity[identity].append((path, key, entity))
        paired = [names for names in by_identity.values() if len({key for _, key, _ in names}) > 1]
        self._alike |= {name: names for names in paired for name in names}
        self._locations |= _locations(path, {key for names in paired for _, key, _ in names}, self._cache)


def knows_identities(path: str) -> bool:
    """Whether a source has the file; only a dataset's folder can, not tars. Raises RunError."""
    tars = path.endswith(".tar") or any(sign in path for sign in "{*")
    return not tars and retried(Store(path).exists, IDENTITIES)


def _locations(path: str, keys: set[str], cache: ShardCache) -> dict[tuple[str, str], _Location]:
    """Where these samples of a dataset lie. Raises RunError where one is not there."""
    if not keys:
        return {}
    index = open_index(path, Filter(), cache)
    locations = {}
    for number, shard in enumerate(index.shards):
        sidecar = shard.url.rsplit("/", 1)[-1].removesuffix(".tar") + ".parquet"
        with named_errors(f"{path}/{sidecar}", ShardError), Store(path).open(sidecar) as file:
            rows = pq.ParquetFile(file).read(columns=["key", "image_offset"])
        kept = rows.filter(rows["image_offset"].is_valid())["key"].to_pylist()
        for sample, key in enumerate(kept, int(index.first[number])):
            if key in keys:
                locations[path, key] = _Location(shard, int(index.offsets[sample]), int(index.sizes[sample]))
    absent = keys - {key for _, key in locations}
    if absent:
        raise RunError(f"{path}/{IDENTITIES}: sample {min(absent)} is not in this dataset")
    return locations
