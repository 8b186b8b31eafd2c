"""A shard's manifest: it exists when the shard does, and says what the shard is made of."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from datapipe.schema import SCHEMA_VERSION, Sample, Slice
from datapipe.shards.read_ahead import read_ahead
from datapipe.shards.store import Store
from subject_diffusion.errors import ShardError

Kind = Literal["raw", "shard"]
"""`raw`: fetched and screened; `shard`: annotated. Also the first part of the files' names."""


@dataclass(frozen=True)
class Provenance:
    """What a shard was made with. `models`: "id@revision" by stage."""

    recipe_hash: str
    code_hash: str
    input: str
    models: dict[str, str]


@dataclass(frozen=True)
class FileRecord:
    """`sha256`: hex digest; `size`: bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """`counts`: rows by outcome ("kept", "dropped", "failed", or "fetched" in a raw shard); `reasons`: by
    "stage/reason"."""

    kind: Kind
    index: int
    first_row: int
    rows: int
    tar: FileRecord
    parquet: FileRecord
    counts: dict[str, int]
    reasons: dict[str, int]
    provenance: Provenance
    schema_version: int = SCHEMA_VERSION

    @property
    def name(self) -> str:
        """The name of its files, without the ending."""
        return shard_name(self.kind, self.index)

    @property
    def file(self) -> str:
        """The name of its own file."""
        return manifest_name(self.kind, self.index)

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1) + "\n").encode()


def shard_name(kind: Kind, index: int) -> str:
    return f"{kind}-{index:06d}"


def manifest_name(kind: Kind, index: int) -> str:
    """Not `shard-000000.json`: there other trainers' tar readers keep an index of their own, and overwrite what is
    there."""
    return f"{shard_name(kind, index)}.manifest.json"


def make_manifest(kind: Kind, work: Slice, tar: FileRecord, parquet: FileRecord, provenance: Provenance) -> Manifest:
    counts = Counter(s.verdict.outcome.value if s.verdict else "fetched" for s in work.samples)
    reasons = Counter(_reason(s) for s in work.samples if s.verdict and s.verdict.reason)
    first = work.samples[0].row if work.samples else 0
    return Manifest(kind, work.index, first, len(work.samples), tar, parquet, dict(counts), dict(reasons), provenance)


def _reason(sample: Sample) -> str:
    assert sample.verdict is not None
    assert sample.verdict.reason is not None
    return f"{sample.verdict.stage.value}/{sample.verdict.reason.value}"


def present(store: Store, kind: Kind) -> list[int]:
    """Indices of the shards that exist, ascending. Only manifests count."""
    pattern = re.compile(rf"{kind}-(\d{{6,}})\.manifest\.json")
    matches = (pattern.fullmatch(name) for name in store.names())
    return sorted(int(m.group(1)) for m in matches if m)


def read_manifest(store: Store, kind: Kind, index: int) -> Manifest:
    """Raises ShardError when it is none of this release's."""
    name = manifest_name(kind, index)
    try:
        tree = json.loads(store.read(name))
        if tree["schema_version"] != SCHEMA_VERSION:
            raise ShardError(
                f"{store.root}/{name}: schema version {tree['schema_version']}; this release reads {SCHEMA_VERSION}"
            )
        # Its files are named by these two: they must not lead out of the folder.
        if (tree["kind"], tree["index"]) != (kind, index):
            raise ValueError("a manifest of another shard")
        return Manifest(
            **{
                **tree,
                "tar": FileRecord(**tree["tar"]),
                "parquet": FileRecord(**tree["parquet"]),
                "provenance": Provenance(**tree["provenance"]),
            }
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ShardError(
            f"{store.root}/{name}: not a manifest of this project; remove it to have the shard made again"
        ) from None


def manifests(store: Store, kind: Kind, index: int | None = None) -> Iterable[Manifest]:
    """The manifests of all shards that exist, in order; `index`: of that shard only, if it exists."""
    if index is None:
        return read_ahead(store, partial(read_manifest, store, kind), present(store, kind))
    # Without a look at the whole folder, which may hold 100,000 shards, and each may be asked for.
    return [read_manifest(store, kind, index)] if store.exists(manifest_name(kind, index)) else []
