"""What `sdd pairs` leaves in a dataset's folder, and beside it in `pairs/`, from which it goes on.

`pairs/` holds for every shard the embeddings and patch features of its entities, for every part of the index the
neighbors that were found in it, and the raw scores of the candidates. Each file says in its metadata what it was made
from, and is made again when that has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from datapipe.shards import Store
from subject_diffusion.errors import RunError, ShardError

FOLDER = "pairs"
SETTINGS_FILE = "settings.json"
EXCLUDED_FILE = "excluded.json"
"""Perceptual hashes of the images that are kept out."""
_MADE_FROM = b"made_from"
Read = TypeVar("Read")


@dataclass(frozen=True)
class Entities:
    """What is known of N entities, in the order of shards, samples and entities, without their features. shard, entity:
    (N,) int32; row: (N,) int64; phash: (N,) uint64, of the image; tag: (N,) object; clip: (N,) object, "" where the
    image is no frame of a video; time_s: (N,) float64, where in it, NaN where that is not known."""

    shard: NDArray[np.int32]
    row: NDArray[np.int64]
    entity: NDArray[np.int32]
    phash: NDArray[np.uint64]
    tag: NDArray[np.object_]
    clip: NDArray[np.object_]
    time_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def joined(cls, parts: list[Entities]) -> Entities:
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


def fingerprint(**made_from: Any) -> str:
    """A digest of everything that decides what is in a file."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def is_made_from(store: Store, name: str, made_from: str) -> bool:
    """Whether the file is there, whole, and of that fingerprint."""
    if not store.exists(name):
        return False
    with store.open(name) as file:
        try:
            return (pq.read_schema(file).metadata or {}) == {_MADE_FROM: made_from.encode()}
        except pa.ArrowException:
            return False


def put_table(store: Store, name: str, table: pa.Table, made_from: str) -> None:
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_MADE_FROM: made_from}), sink, compression="zstd")
    store.put(name, sink.getvalue())


def read_table(store: Store, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Raises ShardError."""
    with store.open(name) as file:
        try:
            return pq.ParquetFile(file).read(columns=None if columns is None else list(columns))
        except (pa.ArrowException, OSError):
            raise ShardError(f"{store.root}/{name}: no parquet; remove it, and run `sdd pairs` again") from None


def read_json(store: Store, name: str, kind: type[Read], option: str) -> Read:
    """What an earlier call was told by an option, and has kept. Raises RunError."""
    try:
        return TypeAdapter(kind).validate_json(store.read(name))
    except ValidationError:
        raise RunError(f"{store.root}/{name}: damaged; remove it, and give {option} again") from None
