"""A slice becomes a shard: the same slice always gives the same bytes."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from datapipe.schema import Reason, Sample, Slice, TarMembers, to_json, to_parquet, to_table
from datapipe.shards.manifest import FileRecord, Kind, Manifest, Provenance, make_manifest, shard_name
from datapipe.shards.store import HashingFile, Store
from datapipe.spill import loaded

THUMBNAILS_OF_A_REASON = 16
"""In a shard; so few that its sidecar stays small, however many images screening drops."""

ROWS_PER_GROUP = 1000
"""Rows of a sidecar that stand together: some 10 MB, most of them masks, where images have 20 candidates each."""


def write_shard(store: Store, kind: Kind, work: Slice, provenance: Provenance) -> Manifest:
    """Commits tar, sidecar, the tar's index (not of a raw shard) and, last, the manifest. The tar holds the images of
    kept samples (in a raw shard: of those still under way), the sidecar a row for every sample, the first few of each
    reason with their thumbnails."""
    name = shard_name(kind, work.index)
    with store.writing(f"{name}.tar") as file:
        members = _write_tar(file, work)
        tar = FileRecord(file.sha256, file.size)
    with store.writing(f"{name}.parquet") as file:
        file.write(to_parquet(to_table(list(_with_few_thumbnails(work.samples)), members), ROWS_PER_GROUP))
        parquet = FileRecord(file.sha256, file.size)
    if kind == "shard":
        store.put(f"{name}.json", _tar_index(f"{name}.tar", tar, work, members))
    manifest = make_manifest(kind, work, tar, parquet, provenance)
    store.put(manifest.file, manifest.to_json())
    return manifest


def _write_tar(file: HashingFile, work: Slice) -> dict[int, TarMembers]:
    members: dict[int, TarMembers] = {}
    # It writes alone; typeshed asks for a whole file object.
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
        for sample in work.samples:
            if sample.image is not None and (sample.verdict is None or sample.is_kept):
                image = loaded(sample).image or b""
                image_offset = _add(tar, f"{sample.key}.jpg", image)
                text = to_json(sample)
                json_offset = _add(tar, f"{sample.key}.json", text)
                members[sample.row] = TarMembers(image_offset, len(image), json_offset, len(text))
    return members


def _tar_index(name: str, tar: FileRecord, work: Slice, members: dict[int, TarMembers]) -> bytes:
    """Where the members lie, in the format and under the name that webshart looks for, which reads single members over
    HTTP. Nothing here reads it, and the manifest leaves it out, because webshart's own tools rewrite it."""
    files: dict[str, dict[str, Any]] = {}
    for sample in work.samples:
        if (at := members.get(sample.row)) is not None:
            files[f"{sample.key}.jpg"] = {
                "offset": at.image_offset,
                "length": at.image_size,
                "width": sample.width,
                "height": sample.height,
                "aspect": sample.width / sample.height,
            }
            files[f"{sample.key}.json"] = {"offset": at.json_offset, "length": at.json_size}
    tree = {"path": name, "filesize": tar.size, "hash": tar.sha256, "includes_image_geometry": True, "files": files}
    return (json.dumps(tree) + "\n").encode()


def _with_few_thumbnails(samples: Iterable[Sample]) -> Iterator[Sample]:
    seen: Counter[Reason] = Counter()
    for sample in samples:
        if sample.thumbnail is not None and sample.verdict is not None and sample.verdict.reason is not None:
            seen[sample.verdict.reason] += 1
            if seen[sample.verdict.reason] > THUMBNAILS_OF_A_REASON:
                sample = sample.replace(thumbnail=None)
        yield sample


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a member with nothing in it that could vary; returns the offset of its data."""
    offset = tar.offset + tarfile.BLOCKSIZE
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return offset
