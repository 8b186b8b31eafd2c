"""Reading shards back, by their manifests."""

from __future__ import annotations

import bisect
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.schema import Reason, Sample, Slice, StageName, current, from_table, sample_problems
from datapipe.shards.manifest import FileRecord, Kind, Manifest, manifest_name, manifests, present, read_manifest
from datapipe.shards.store import Store
from datapipe.spill import Spill
from subject_diffusion.errors import ShardError, one_line


def read_slice(store: Store, manifest: Manifest, spill: Spill | None = None) -> Slice:
    """Every row of a shard, with the images of those that are in its tar; as many of them in memory as `spill` allows,
    by default all. Raises ShardError when a hash differs."""
    table = _sidecar(store, manifest)
    tar = _checked_file(store, f"{manifest.name}.tar", manifest.tar)
    held = Spill(manifest.tar.size) if spill is None else spill
    offsets, sizes = table["image_offset"].to_pylist(), table["image_size"].to_pylist()
    samples = [
        sample if offset is None else sample.replace(image=held.hold_at(tar, offset, size))
        for sample, offset, size in zip(from_table(table), offsets, sizes, strict=True)
    ]
    return Slice(manifest.index, tuple(samples))


def read_sample(store: Store, key: str, index: int | None = None) -> Sample:
    """One row, by its key, with its image where the folder still has it; `index`: its shard, if known. Raises
    ShardError."""
    if not key.isdecimal():
        raise ShardError(f"{key!r} is no key; keys are row numbers of {len(Sample(row=0).key)} digits, as in the tar")
    row = int(key)
    # By bisection, because in a bucket every manifest is a request.
    indices = [i for i in present(store, "shard") if index in (None, i)]
    after = bisect.bisect_right(indices, row, key=lambda i: read_manifest(store, "shard", i).first_row)
    if after:
        manifest = read_manifest(store, "shard", indices[after - 1])
        if row < manifest.first_row + manifest.rows:
            return read_samples(store, manifest, [row])[0]
    where = store.root if index is None else f"shard {index} of {store.root}"
    raise ShardError(f"{where} has no sample {key}")


def read_samples(store: Store, manifest: Manifest, rows: Sequence[int]) -> list[Sample]:
    """Some rows of a shard, in the order asked for, each with its image: that of a kept row is in the shard's tar,
    that of a row lost after screening in the raw shard's, until those are deleted."""
    table = _rows(_sidecar(store, manifest), rows)
    samples = _with_images(store, f"{manifest.name}.tar", list(map(_usable, from_table(table))), table)
    if any(s.image is None for s in samples) and store.exists(manifest_name("raw", manifest.index)):
        raw = read_manifest(store, "raw", manifest.index)
        lost = [s for s in samples if s.image is None]
        found = _with_images(store, f"{raw.name}.tar", lost, _rows(_sidecar(store, raw), [s.row for s in lost]))
        samples = [s if s.image is not None else found.pop(0) for s in samples]
    return samples


def _usable(sample: Sample) -> Sample:
    """The sample; one that is corrupt failed with the reason, and without what cannot be drawn."""
    problem = next(sample_problems(sample), None)
    if problem is None:
        return sample
    return Sample(row=sample.row).failed(StageName.SELECT, Reason.UNREADABLE, f"corrupt: {problem}")


def _rows(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """The rows of a sidecar with these row numbers of the input, in the order asked for."""
    position = {row: i for i, row in enumerate(table["row"].to_pylist())}
    return table.take([position[row] for row in rows])


def _with_images(store: Store, tar: str, samples: Sequence[Sample], table: pa.Table) -> list[Sample]:
    """`table`: a sidecar's rows of the same samples, which tells where in the tar their images lie."""
    places = zip(table["image_offset"].to_pylist(), table["image_size"].to_pylist(), strict=True)
    return [
        sample if offset is None else sample.replace(image=store.read(tar, offset, size))
        for sample, (offset, size) in zip(samples, places, strict=True)
    ]


def kept_samples(store: Store) -> Iterator[Sample]:
    """Every kept sample with its image, in order, shard by shard. Raises ShardError for one that is corrupt."""
    for manifest in manifests(store, "shard"):
        yield from kept_of(store, manifest)


def _refuse(where: str, problem: str) -> None:
    raise ShardError(f"{where} is corrupt: {problem}; `sdd verify` lists all such")


def kept_of(store: Store, manifest: Manifest, corrupt: Callable[[str, str], None] = _refuse) -> Iterator[Sample]:
    """The kept samples of one shard, with their images. `corrupt` is told of those that are left out because
    `sample_problems` objects to them: which, and why; by default it raises ShardError."""
    for sample in read_slice(store, manifest).samples:
        if sample.image is None:
            continue
        problem = next(sample_problems(sample), None)
        if problem is None:
            yield sample
        else:
            corrupt(f"{store.root}/{manifest.name}.tar, sample {sample.row}", problem)


def iter_tables(
    store: Store, kind: Kind = "shard", columns: Sequence[str] | None = None, index: int | None = None
) -> Iterator[pa.Table]:
    """The sidecars, one after another; `columns`: only these, default: all; `index`: only this shard, default: all."""
    for manifest in manifests(store, kind, index):
        yield _table(store, manifest, columns)


def _table(store: Store, manifest: Manifest, columns: Sequence[str] | None) -> pa.Table:
    name = f"{manifest.name}.parquet"
    with store.open(name) as file:
        try:
            return pq.ParquetFile(file).read(columns=None if columns is None else list(columns))
        except pa.ArrowInvalid:
            raise ShardError(
                f"{store.root}/{name}: not the file its manifest describes; remove the manifest to have it made again"
            ) from None


def _sidecar(store: Store, manifest: Manifest) -> pa.Table:
    name = f"{manifest.name}.parquet"
    try:
        table = pq.ParquetFile(io.BytesIO(_checked(store, name, manifest.parquet))).read()
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{store.root}/{name}: no parquet ({one_line(error)}); make this shard again") from None
    try:
        return current(table)
    except ShardError as error:
        raise ShardError(f"{store.root}/{name}: {error}; make this shard again") from None


def _checked(store: Store, name: str, record: FileRecord) -> bytes:
    data = store.read(name)
    _check(store, name, record, len(data), hashlib.sha256(data).hexdigest())
    return data


def _checked_file(store: Store, name: str, record: FileRecord) -> IO[bytes]:
    file = store.local_file(name)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed asks for more
    _check(store, name, record, file.seek(0, os.SEEK_END), digest)
    return file


def _check(store: Store, name: str, record: FileRecord, size: int, sha256: str) -> None:
    if (size, sha256) != (record.size, record.sha256):
        raise ShardError(
            f"{store.root}/{name}: not the file its manifest describes; remove the manifest to have it made again"
        )
