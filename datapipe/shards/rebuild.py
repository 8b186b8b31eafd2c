"""Manifests that were lost or overwritten, written again from the shards that they were of."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.schema import Slice, current, from_table
from datapipe.shards.manifest import Kind, Manifest, Provenance, make_manifest, present, read_manifest, shard_name
from datapipe.shards.store import RUN_FILE, Store
from datapipe.shards.verify import KINDS, PART, record_of, shard_problems
from subject_diffusion.errors import SddError


def rebuild_manifests(store: Store) -> Iterator[str]:
    """Writes the manifest of every shard that lacks only it: tar and sidecar are there, whole, and agree. Yields the
    names of what it wrote.

    The shard's input is told by `run.json`, what else it was made with by the nearest manifest; without both there is
    none to write.
    """
    names = set(store.names())
    for kind in KINDS:
        done = set(present(store, kind))
        tars = (match for name in names if (match := PART.fullmatch(name)) and match[2] == "tar")
        for index in sorted(int(m[1].rpartition("-")[2]) for m in tars if m[1].startswith(f"{kind}-")):
            if index in done or f"{shard_name(kind, index)}.parquet" not in names:
                continue
            manifest = _rebuilt(store, kind, index)
            if manifest is not None and not any(shard_problems(store, manifest)):
                store.put(manifest.file, manifest.to_json())
                yield manifest.file


def _rebuilt(store: Store, kind: Kind, index: int) -> Manifest | None:
    name = shard_name(kind, index)
    try:
        sidecar = store.read(f"{name}.parquet")
        samples = tuple(from_table(current(pq.ParquetFile(io.BytesIO(sidecar)).read())))
        made_with = _made_with(store, index, samples[0].row)
    except (SddError, pa.ArrowInvalid, OSError, ValueError, TypeError, KeyError, IndexError):
        return None  # `verify` names the file and says what is wrong with it
    if made_with is None:
        return None
    tar = record_of(store.read(f"{name}.tar"))
    return make_manifest(kind, Slice(index, samples), tar, record_of(sidecar), made_with)


def _made_with(store: Store, index: int, first_row: int) -> Provenance | None:
    """What a lost manifest said that its shard does not."""
    others = [(kind, other) for kind in KINDS for other in present(store, kind)]
    if not others or not store.exists(RUN_FILE):
        return None
    nearest = read_manifest(store, *min(others, key=lambda other: abs(other[1] - index)))
    end = 0
    for part in json.loads(store.read(RUN_FILE))["parts"]:
        end += part["rows"]
        if first_row < end:
            return replace(nearest.provenance, input=part["input"])
    return None
