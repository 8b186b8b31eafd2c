"""Where the samples of a source lie, and which of them are wanted: found once, kept on disk, mapped into memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from braceexpand import braceexpand
from filelock import FileLock
from fsspec.utils import tokenize
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console
from rich.progress import track

from datapipe.errors import RunError, SddError, ShardError
from datapipe.schema import Entity
from datapipe.settings import Settings
from datapipe.shards import Manifest, Store, read_manifest
from datapipe.shards.store import named_errors
from train.cache import ShardCache, ShardFile, file_system, is_missing, retried

INDEX_SUFFIX = ".index.parquet"
"""Of the index kept beside a tar that has no manifest."""

_MANIFEST = re.compile(r"shard-(\d{6,})\.json")
_READERS = 16
_PROGRESS_FROM = 200  # shards; fewer are read at once


class Filter(Settings):
    """Which samples, and which of their entities, a stream gives. Needs the sidecars that `sdd dataset` writes."""

    min_score: float = Field(0.0, ge=0, le=1)
    """Entities with a lower score are left out."""
    tags: frozenset[str] | None = None
    """Entities with other tags are left out; none: every tag is wanted."""
    without_tags: frozenset[str] = frozenset()
    """Images with an entity of such a tag are left out."""
    min_entities: int = Field(0, ge=0)
    """Images with fewer entities (of those wanted) are left out."""
    max_entities: int | None = Field(None, ge=1)
    """Images with more are left out; none: no limit."""
    min_side_px: int = Field(0, ge=0)
    """Images with a shorter side are left out."""

    def entities(self, entities: Sequence[Entity]) -> tuple[Entity, ...]:
        """Those that are wanted."""
        return tuple(e for e in entities if e.score >= self.min_score and (self.tags is None or e.tag in self.tags))

    @property
    def looks_at_entities(self) -> bool:
        return self != Filter(min_side_px=self.min_side_px)

    def keeps(self, sidecar: pa.Table) -> NDArray[np.bool_]:
        """(N,) which rows of a sidecar are wanted. Rows without members in the tar never are."""
        kept: NDArray[np.bool_] = sidecar["image_offset"].is_valid().to_numpy()
        sides = np.minimum(sidecar["width"].to_numpy(), sidecar["height"].to_numpy())
        kept &= sides >= self.min_side_px
        if not self.looks_at_entities:
            return kept
        candidates = sidecar["candidates"].combine_chunks()
        rows = pc.list_parent_indices(candidates).to_numpy()
        tag, score, rejected = (candidates.flatten().field(name) for name in ("tag", "score", "rejected"))
        entity = rejected.is_null().to_numpy(zero_copy_only=False)
        unwanted = entity & pc.is_in(tag, pa.array(sorted(self.without_tags), pa.string())).to_numpy(False)
        wanted = entity & (score.to_numpy(zero_copy_only=False) >= self.min_score)
        if self.tags is not None:
            wanted &= pc.is_in(tag, pa.array(sorted(self.tags), pa.string())).to_numpy(False)
        count = np.bincount(rows[wanted], minlength=len(kept))
        kept &= np.bincount(rows[unwanted], minlength=len(kept)) == 0
        kept &= (count >= self.min_entities) & (count <= (self.max_entities or np.inf))
        return kept


@dataclass(frozen=True)
class Index:
    """The wanted samples of a source, numbered as they lie on disk.

    first: (S + 1,) int64, number of samples before each shard, and of all. offsets, sizes: (N,) int64, the bytes of a
    sample's members in its tar, headers included. folder: where all this lies; an index travels to other processes by
    that name.
    """

    shards: tuple[ShardFile, ...]
    first: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    folder: Path

    def __len__(self) -> int:
        return int(self.first[-1])

    def places(self, samples: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Shard, offset and size of each of these samples, (n,)."""
        shards = np.searchsorted(self.first, samples, side="right") - 1
        return list(zip(shards.tolist(), self.offsets[samples].tolist(), self.sizes[samples].tolist(), strict=True))

    @property
    def fingerprint(self) -> str:
        """Of the files, as they were listed, and of the filter."""
        return self.folder.name.removeprefix("index-")

    @classmethod
    def load(cls, folder: Path) -> Index:
        shards = tuple(ShardFile(**shard) for shard in json.loads((folder / "shards.json").read_text()))
        first, offsets, sizes = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("first", "offsets", "sizes"))
        return cls(shards, first, offsets, sizes, folder)

    def __reduce__(self) -> tuple[Callable[[Path], Index], tuple[Path]]:
        return Index.load, (self.folder,)


def open_index(path: str, keep: Filter, cache: ShardCache) -> Index:
    """The index of a source, built when this machine sees these files and this filter for the first time.

    path: a dataset folder, a folder of WebDataset tars, or tars: one, a glob, or braces (`{0000..0099}.tar`).
    Raises ShardError.
    """
    tars, state = _find(path)
    wanted = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in keep}
    key = hashlib.sha256(json.dumps([tars, state, wanted]).encode()).hexdigest()[:32]
    folder = cache.folder / f"index-{key}"
    if not folder.exists():
        with FileLock(cache.folder / "index.lock"):
            if not folder.exists():
                _save(folder, _read_all(path, tars, keep, cache))
    return Index.load(folder)


def _find(path: str) -> tuple[list[str], list[str]]:
    """The tars of a source, in order, and what changes when one of them does."""
    urls = list(braceexpand(path)) if "{" in path else [path]
    fs, inner = file_system(urls[0])
    with named_errors(path, ShardError):
        if len(urls) > 1:
            infos = [fs.info(fs._strip_protocol(url)) for url in urls]
        elif "*" in path:
            infos = list(fs.glob(inner, detail=True).values())
        elif inner.endswith(".tar"):
            infos = [fs.info(inner)]
        else:
            infos = fs.ls(inner, detail=True)
            ours = [i for i in infos if _MANIFEST.fullmatch(_name(i))]
            if ours:  # a tar without its manifest is no shard
                infos = [{**i, "name": i["name"].removesuffix(".json") + ".tar"} for i in ours]
    infos = sorted((i for i in infos if _name(i).endswith(".tar")), key=lambda i: i["name"])
    if not infos:
        raise ShardError(f"{path}: no shards here; `make dataset` writes them, and any WebDataset tars will do")
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    tars = [os.path.abspath(i["name"]) if local else fs.unstrip_protocol(i["name"]) for i in infos]
    return tars, [tokenize(i) for i in infos]


def _name(info: dict[str, Any]) -> str:
    return str(info["name"]).rsplit("/", 1)[-1]


Part = tuple[ShardFile, NDArray[np.int64]]
"""A shard, and (n, 2) offset and size of its wanted samples."""


def _read_all(path: str, tars: list[str], keep: Filter, cache: ShardCache) -> list[Part]:
    with ThreadPoolExecutor(_READERS) as pool:
        parts = pool.map(lambda tar: _read(tar, keep, cache), tars)
        console = Console(stderr=True)
        quiet = len(tars) < _PROGRESS_FROM or not console.is_terminal
        return list(track(parts, f"index of {path}", len(tars), console=console, transient=True, disable=quiet))


def _read(tar: str, keep: Filter, cache: ShardCache) -> Part:
    manifest = retried(_manifest_of, tar)
    if manifest is not None:
        return retried(_read_ours, tar, manifest, keep)
    if keep != Filter():
        raise ShardError(f"{tar}: filters need the manifest and sidecar that `sdd dataset` writes; there are none")
    return _read_foreign(tar, cache)


def _manifest_of(tar: str) -> Manifest | None:
    folder, name = tar.rsplit("/", 1)
    ours = _MANIFEST.fullmatch(name.removesuffix(".tar") + ".json")
    if ours is None:
        return None
    try:
        return read_manifest(Store(folder), "shard", int(ours.group(1)))
    except SddError as error:
        if not is_missing(error):
            raise
        return None


def _read_ours(tar: str, manifest: Manifest, keep: Filter) -> Part:
    columns = ["image_offset", "json_offset", "json_size", "width", "height"]
    if keep.looks_at_entities:
        columns += [f"candidates.list.element.{name}" for name in ("tag", "score", "rejected")]
    path = tar.removesuffix(".tar") + ".parquet"
    with named_errors(path, ShardError), Store(tar.rsplit("/", 1)[0]).open(f"{manifest.name}.parquet") as file:
        try:
            sidecar = pq.ParquetFile(file).read(columns=columns)
        except pa.ArrowInvalid as error:
            raise ShardError(f"{path}: damaged ({error}); make this shard again") from None
    sidecar = sidecar.filter(pa.array(keep.keeps(sidecar)))
    start = sidecar["image_offset"].to_numpy() - tarfile.BLOCKSIZE
    end = sidecar["json_offset"].to_numpy() + sidecar["json_size"].to_numpy()
    return ShardFile(tar, manifest.tar.size, manifest.tar.sha256), np.stack([start, end - start], axis=1)


def _read_foreign(tar: str, cache: ShardCache) -> Part:
    """A tar without manifest: its samples are found by its headers, and written down beside it."""
    shard, index = retried(_look_up, tar)
    if index is not None and index.schema.metadata[b"size"] == str(shard.size).encode():
        return shard, np.stack([index["offset"].to_numpy(), index["size"].to_numpy()], axis=1)
    ranges = _scan(shard, cache)
    table = pa.table({"offset": ranges[:, 0], "size": ranges[:, 1]}, metadata={"size": str(shard.size)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    folder, name = tar.rsplit("/", 1)
    # Where nothing can be written (http, a folder of someone else's) this machine's cache alone has the index.
    with contextlib.suppress(RunError, NotImplementedError):
        Store(folder).put(name + INDEX_SUFFIX, sink.getvalue().to_pybytes())
    return shard, ranges


def _look_up(tar: str) -> tuple[ShardFile, pa.Table | None]:
    """A tar, and the index that lies beside it."""
    fs, inner = file_system(tar)
    with named_errors(tar, ShardError):
        shard = ShardFile(tar, int(fs.info(inner)["size"]), None)
    try:
        with named_errors(tar + INDEX_SUFFIX, ShardError):
            return shard, pq.read_table(pa.BufferReader(fs.cat_file(inner + INDEX_SUFFIX)))
    except ShardError as error:
        if not is_missing(error):
            raise
        return shard, None


def _scan(shard: ShardFile, cache: ShardCache) -> NDArray[np.int64]:
    """(n, 2) offset and size of every sample of a tar: of adjacent members whose names agree up to the first dot."""
    ranges: list[tuple[int, int]] = []
    last = None
    with os.fdopen(cache.open(shard), "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isreg():
                        continue
                    key = sample_key(member.name)
                    end = member.offset_data + member.size
                    start = member.offset if key != last else ranges.pop()[0]
                    ranges.append((start, end - start))
                    last = key
            end = tarfile.BLOCKSIZE * -(-sum(ranges[-1] if ranges else (0,)) // tarfile.BLOCKSIZE)
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes half a header for the end
                raise tarfile.ReadError(f"nothing to read at byte {end}")
        except (tarfile.TarError, EOFError) as error:
            raise ShardError(f"{shard.url}: not a whole tar ({error}); fetch it again") from None
    return np.array(ranges, np.int64).reshape(-1, 2)


def sample_key(member: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the file name."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.split(".", 1)[0]


def _save(folder: Path, parts: list[Part]) -> None:
    draft = folder.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    ranges = np.concatenate([part for _, part in parts])
    np.save(draft / "first.npy", np.cumsum([0, *(len(part) for _, part in parts)]))
    np.save(draft / "offsets.npy", ranges[:, 0])
    np.save(draft / "sizes.npy", ranges[:, 1])
    (draft / "shards.json").write_text(json.dumps([asdict(shard) for shard, _ in parts]))
    draft.rename(folder)
