"""Manifests that were lost or overwritten, written again from the shards that they were of."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

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
from datapipe.shards.store import RUN_FILE, Store
from datapipe.shards.verify import KINDS, PART, record_of, shard_problems
from subject_diffusion.errors import SddError


def rebuild_manifests(store: Store) -> Iterator[str]:
    """Writes the manifest of every shard that lacks only it, or has another's file in its place: tar and sidecar are
    there, whole, and agree. Yields the names of what it wrote.

    The shard's input is told by `run.json`, what else it was made with by the nearest manifest; without both there is
    none to write.
    """
    names = set(store.names())
    held = [(kind, index) for kind in KINDS for index in present(store, kind) if _is_manifest(store, kind, index)]
    for kind in KINDS:
        done = {index for of_kind, index in held if of_kind == kind}
        tars = (match for name in names if (match := PART.fullmatch(name)) and match[2] == "tar")
        for index in sorted(int(m[1].rpartition("-")[2]) for m in tars if m[1].startswith(f"{kind}-")):
            if index in done or f"{shard_name(kind, index)}.parquet" not in names:
                continue
            manifest = _rebuilt(store, kind, index, held)
            if manifest is not None and not any(shard_problems(store, manifest)):
                store.put(manifest.file, manifest.to_json())
                yield manifest.file


def _is_manifest(store: Store, kind: Kind, index: int) -> bool:
    """Of whichever release: what another one wrote is not ours to replace."""
    try:
        return "schema_version" in json.loads(store.read(manifest_name(kind, index)))
    except (ValueError, TypeError, RecursionError):
        return False


def _rebuilt(store: Store, kind: Kind, index: int, held: Sequence[tuple[Kind, int]]) -> Manifest | None:
    """held: the manifests that are there."""
    name = shard_name(kind, index)
    try:
        sidecar = store.read(f"{name}.parquet")
        samples = tuple(from_table(current(pq.ParquetFile(io.BytesIO(sidecar)).read())))
        made_with = _made_with(store, index, samples[0].row, held)
    except (SddError, pa.ArrowInvalid, OSError, ValueError, TypeError, KeyError, IndexError):
        return None  # `verify` names the file and says what is wrong with it
    if made_with is None:
        return None
    tar = record_of(store.read(f"{name}.tar"))
    return make_manifest(kind, Slice(index, samples), tar, record_of(sidecar), made_with)


def _made_with(store: Store, index: int, first_row: int, held: Sequence[tuple[Kind, int]]) -> Provenance | None:
    """What a lost manifest said that its shard does not."""
    if not held or not store.exists(RUN_FILE):
        return None
    nearest = read_manifest(store, *min(held, key=lambda other: abs(other[1] - index)))
    end = 0
    for part in json.loads(store.read(RUN_FILE))["parts"]:
        end += part["rows"]
        if first_row < end:
            return replace(nearest.provenance, input=part["input"])
    return None
