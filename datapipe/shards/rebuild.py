"""Manifests that were lost or overwritten, written again from the shards that they were of."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.schema import Slice, current, from_table
from datapipe.shards.manifest import (
    Kind,
    Manifest,
    Provenance,
    make_manifest,
    manifest_name,
    present,
    read_manifest,
    shard_name,
)
from datapipe.shards.read_ahead import read_ahead
from datapipe.shards.store import RUN_FILE, Store
from datapipe.shards.verify import KINDS, PART, record_of, shard_problems
from subject_diffusion.errors import SddError, ShardError

Donors = Sequence[tuple[int, Provenance]]
"""What manifests that are there say, by the index of their shard."""


def rebuild_manifests(store: Store) -> Iterator[str]:
    """Writes the manifest of every shard that lacks only it, or has another's file in its place: tar and sidecar are
    there, whole, and agree. Yields the names of what it wrote.

    The shard's input is told by `run.json`, what else it was made with by the nearest manifest; without both there is
    none to write.
    """
    names = set(store.names())
    shards = [(kind, index) for kind in KINDS for index in present(store, kind)]
    held, donors = set(), []
    for shard, (is_manifest, provenance) in zip(shards, read_ahead(store, partial(_look, store), shards), strict=True):
        if is_manifest:
            held.add(shard)
        if provenance is not None:
            donors.append((shard[1], provenance))
    for kind in KINDS:
        done = {index for of_kind, index in held if of_kind == kind}
        tars = (match for name in names if (match := PART.fullmatch(name)) and match[2] == "tar")
        for index in sorted(int(m[1].rpartition("-")[2]) for m in tars if m[1].startswith(f"{kind}-")):
            if index in done or f"{shard_name(kind, index)}.parquet" not in names:
                continue
            manifest = _rebuilt(store, kind, index, donors)
            if manifest is not None and not any(shard_problems(store, manifest)):
                store.put(manifest.file, manifest.to_json())
                yield manifest.file


def _look(store: Store, shard: tuple[Kind, int]) -> tuple[bool, Provenance | None]:
    """Whether a shard has a manifest, of whichever release, because what another one wrote is not ours to replace; and
    what one of this release says that the shard was made with."""
    try:
        return True, read_manifest(store, *shard).provenance
    except ShardError:
        pass
    try:
        return "schema_version" in json.loads(store.read(manifest_name(*shard))), None
    except (ValueError, TypeError, RecursionError):
        return False, None


def _rebuilt(store: Store, kind: Kind, index: int, donors: Donors) -> Manifest | None:
    name = shard_name(kind, index)
    try:
        sidecar = store.read(f"{name}.parquet")
        samples = tuple(from_table(current(pq.ParquetFile(io.BytesIO(sidecar)).read())))
        made_with = _made_with(store, index, samples[0].row, donors)
    except (SddError, pa.ArrowInvalid, OSError, ValueError, TypeError, KeyError, IndexError):
        return None  # `verify` names the file and says what is wrong with it
    if made_with is None:
        return None
    tar = record_of(store.read(f"{name}.tar"))
    return make_manifest(kind, Slice(index, samples), tar, record_of(sidecar), made_with)


def _made_with(store: Store, index: int, first_row: int, donors: Donors) -> Provenance | None:
    """What a lost manifest said that its shard does not."""
    if not donors or not store.exists(RUN_FILE):
        return None
    _, nearest = min(donors, key=lambda other: abs(other[0] - index))
    end = 0
    for part in json.loads(store.read(RUN_FILE))["parts"]:
        end += part["rows"]
        if first_row < end:
            return replace(nearest, input=part["input"])
    return None
