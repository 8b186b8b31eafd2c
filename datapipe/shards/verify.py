"""Does a dataset folder hold what its manifests say? Reads everything once; memory stays flat."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from datapipe.schema import Sample, Slice, TarMembers, current, from_table, sample_problems, to_json
from datapipe.shards.manifest import (
    FileRecord,
    Kind,
    Manifest,
    make_manifest,
    manifest_name,
    present,
    read_manifest,
    shard_name,
)
from datapipe.shards.store import RUN_FILE, Store
from datapipe.sources.tar_headers import BoundedTarInfo
from subject_diffusion.errors import SddError, ShardError, one_line

KINDS: tuple[Kind, ...] = ("raw", "shard")
PART = re.compile(r"((?:raw|shard)-\d{6,})\.(tar|parquet|json)")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Problem:
    """`file`: a name in the folder; `what`: one line."""

    file: str
    what: str


def verify(store: Store) -> Iterator[Problem]:
    """Everything in the folder that contradicts its manifests, as it is found; nothing when all is well. A shard that
    is still missing is a problem where `run.json` tells how many there should be."""
    yield from _orphans(store)
    yield from _missing(store)
    for kind in KINDS:
        before: Manifest | None = None
        for index in present(store, kind):
            try:
                manifest = read_manifest(store, kind, index)
            except SddError as error:
                yield Problem(manifest_name(kind, index), str(error))
                continue
            yield from shard_problems(store, manifest)
            if before and index == before.index + 1 and manifest.first_row != before.first_row + before.rows:
                what = f"starts at row {manifest.first_row}, but {before.name} ends at {before.first_row + before.rows}"
                yield Problem(manifest.file, what)
            before = manifest


def _orphans(store: Store) -> Iterator[Problem]:
    for name in store.temporaries():
        yield Problem(name, "is temporary: a run is writing it, or was killed and --repair may remove it")
    names = store.names()
    known = set(names)
    for name in names:
        match = PART.fullmatch(name)
        if match and f"{match[1]}.manifest.json" not in known:
            yield Problem(name, "has no manifest: a run is writing it, or was killed; the next run makes it again")


def _missing(store: Store) -> Iterator[Problem]:
    """Shards that the run which the folder belongs to has not made, or that were lost since."""
    if not store.exists(RUN_FILE):
        return
    try:
        run = json.loads(store.read(RUN_FILE))
        slices = sum(math.ceil(part["rows"] / run["recipe"]["slice_rows"]) for part in run["parts"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        yield Problem(RUN_FILE, "not the record of a run")
        return
    lost = sorted(set(range(slices)) - set(present(store, "shard")))
    if lost:
        what = f"{len(lost)} of {slices} shards are not there, {shard_name('shard', lost[0])} first"
        yield Problem(RUN_FILE, f"{what}; `sdd dataset` makes them")


def shard_problems(store: Store, manifest: Manifest) -> Iterator[Problem]:
    """Everything in a shard's files that contradicts its manifest."""
    sidecar = f"{manifest.name}.parquet"
    try:
        data = store.read(sidecar)
        if record_of(data) != manifest.parquet:
            yield Problem(sidecar, "size or SHA-256 differs from the manifest's")
        table = current(pq.ParquetFile(io.BytesIO(data)).read())
    except (SddError, pa.ArrowInvalid, OSError) as error:
        yield Problem(sidecar, one_line(error))
        return
    try:
        samples = from_table(table)
    except ShardError as error:
        yield Problem(sidecar, f"holds a row that is no sample: {one_line(error)}")
        return
    for what in _count_problems(manifest, samples):
        yield Problem(manifest.file, what)
    for sample in samples:
        for what in sample_problems(sample):
            yield Problem(sidecar, f"{sample.key}: {what}")
    places = table.select(["image_offset", "image_size", "json_offset", "json_size"]).to_pylist()
    members = {
        s.row: TarMembers(**place)
        for s, place in zip(samples, places, strict=True)
        if place["image_offset"] is not None
    }
    for what in _tar_problems(store, manifest, samples, members):
        yield Problem(f"{manifest.name}.tar", what)


def _count_problems(manifest: Manifest, samples: list[Sample]) -> Iterator[str]:
    rows = range(manifest.first_row, manifest.first_row + manifest.rows)
    if [s.row for s in samples] != list(rows):
        yield f"says rows {rows.start} to {rows.stop - 1}, but the sidecar holds others"
    if sum(manifest.counts.values()) != manifest.rows:
        yield f"accounts for {sum(manifest.counts.values())} of {manifest.rows} rows"
    found = make_manifest(
        manifest.kind, Slice(manifest.index, tuple(samples)), manifest.tar, manifest.parquet, manifest.provenance
    )
    if (found.counts, found.reasons) != (manifest.counts, manifest.reasons):
        yield f"counts {manifest.counts} {manifest.reasons}, the sidecar {found.counts} {found.reasons}"
    if manifest.kind == "shard" and "fetched" in found.counts:
        yield f"{found.counts['fetched']} rows have no verdict"


def _tar_problems(
    store: Store, manifest: Manifest, samples: list[Sample], members: dict[int, TarMembers]
) -> Iterator[str]:
    """Streams the tar once: its hash, and each member's place and content against the sidecar."""
    by_key = {s.key: s for s in samples}
    missing = {f"{s.key}.{ending}" for s in samples if _belongs(s) for ending in ("jpg", "json")}
    try:
        with store.open(f"{manifest.name}.tar") as opened:
            file = _HashedReads(opened)
            try:
                # It reads alone; typeshed asks for a whole file object.
                with tarfile.open(fileobj=file, mode="r|", tarinfo=BoundedTarInfo) as tar:  # type: ignore[call-overload]
                    for member in tar:
                        key, _, ending = member.name.partition(".")
                        if member.name not in missing or by_key[key].row not in members:
                            yield f"{member.name}: the sidecar knows no such member"
                            continue
                        missing.remove(member.name)
                        body = tar.extractfile(member)
                        data = body.read() if body is not None else b""
                        sample = by_key[key]
                        place = member.offset_data, member.size
                        problem = _member_problem(ending, place, data, sample, members[sample.row])
                        if problem:
                            yield f"{member.name}: {problem}"
            except (tarfile.TarError, ValueError, OverflowError) as error:
                yield f"not a whole tar: {one_line(error)}"
            if file.drained() != manifest.tar:
                yield "size or SHA-256 differs from the manifest's"
    except (SddError, OSError) as error:
        yield one_line(error)
        return
    if missing:
        yield f"lacks {len(missing)} members, {min(missing)} first"


def _belongs(sample: Sample) -> bool:
    """In a raw shard the samples still under way are in the tar, in a final one the kept ones."""
    return sample.verdict is None or sample.is_kept


def _member_problem(ending: str, place: tuple[int, int], data: bytes, sample: Sample, known: TarMembers) -> str | None:
    image, text = (known.image_offset, known.image_size), (known.json_offset, known.json_size)
    expected = image if ending == "jpg" else text
    if place != expected:
        return f"lies at {place[0]} with {place[1]} bytes, by the sidecar at {expected[0]} with {expected[1]}"
    if ending == "json":
        return None if data == to_json(sample) else "says something else than the sidecar"
    try:
        size = Image.open(io.BytesIO(data), formats=("JPEG",)).size
    except (OSError, Image.DecompressionBombError):
        return "is no JPEG"
    if size != (sample.width, sample.height):
        return f"is of {size[0]} x {size[1]} pixels, by the sidecar of {sample.width} x {sample.height}"
    return None


def record_of(data: bytes) -> FileRecord:
    """What a manifest says of a file with this content."""
    return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


class _HashedReads:
    """A file for reading in order that hashes what it reads."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self._size += len(data)
        return data

    def drained(self) -> FileRecord:
        """The whole file's record, once what is left of it has been read."""
        while self.read(_CHUNK):
            pass
        return FileRecord(self._digest.hexdigest(), self._size)
