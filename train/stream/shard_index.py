"""Where the samples of a source lie, and which of them are wanted: found once, kept on disk, mapped into memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
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
from rich.console import Console
from rich.progress import track

from datapipe.shards import Manifest, Store, read_manifest
from datapipe.sources.compression import is_compressed
from datapipe.sources.tar_headers import tar_headers
from datapipe.sources.tar_keys import Group, KeyRule, group_members, is_clutter, rule_for
from subject_diffusion.errors import RunError, SddError, ShardError, one_line
from subject_diffusion.storage import file_system, is_local, named_errors, whole_folder
from train.stream.cache import ShardCache, ShardFile, is_missing, retried
from train.stream.filter import Filter

INDEX_SUFFIX = ".index.parquet"
"""Ending of the index kept beside a tar that has no manifest."""

_MANIFEST = re.compile(r"shard-(\d{6,})\.manifest\.json")
_SHARD = re.compile(r"shard-\d{6,}\.tar")
_ARRAYS = ("first", "offsets", "sizes", "shapes")
_READERS = 16
_PROGRESS_FROM = 200  # shards; fewer are read at once


@dataclass(frozen=True)
class Index:
    """The wanted samples of a source, numbered as they lie on disk.

    first: (S + 1,) int64, number of samples before each shard, and of all. offsets, sizes: (N,) int64, the bytes of a
    sample's members in its tar, headers included. shapes: (N, 2) int32, height and width of a sample's image in pixels,
    zeros where there is no sidecar. folder: where all this lies; an index travels to other processes by that name.
    """

    shards: tuple[ShardFile, ...]
    first: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    shapes: NDArray[np.int32]
    folder: Path

    def __len__(self) -> int:
        return int(self.first[-1])

    def shard_of(self, sample: int) -> ShardFile:
        return self.shards[int(np.searchsorted(self.first, sample, side="right")) - 1]

    def places(self, samples: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Shard, offset and size of each of these samples, (n,)."""
        shards = np.searchsorted(self.first, samples, side="right") - 1
        return list(zip(shards.tolist(), self.offsets[samples].tolist(), self.sizes[samples].tolist(), strict=True))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the shards, wherever they lie: names, sizes, and SHA-256 where a manifest says it."""
        shards = [[shard.name, shard.size, shard.sha256, shard.key_rule] for shard in self.shards]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:32]

    @classmethod
    def load(cls, folder: Path) -> Index:
        try:
            shards = tuple(ShardFile(**shard) for shard in json.loads((folder / "shards.json").read_text()))
            # Without pickle, which runs what is in it.
            first, offsets, sizes, shapes = (np.load(folder / f"{n}.npy", "r", allow_pickle=False) for n in _ARRAYS)
        except (OSError, ValueError, TypeError) as error:
            raise ShardError(f"{folder}: no index ({one_line(error)}); remove it") from None
        return cls(shards, first, offsets, sizes, shapes, folder)

    def __reduce__(self) -> tuple[Callable[[Path], Index], tuple[Path]]:
        return Index.load, (self.folder,)


def open_index(path: str, keep: Filter, cache: ShardCache, rule: KeyRule = "auto") -> Index:
    """The index of a source, built when this machine sees these files and this filter for the first time.

    path: a dataset folder, a folder of WebDataset tars, or tars: one, a glob, or braces (`{0000..0099}.tar`). rule: of
    tars that have no manifest. Raises ShardError.
    """
    tars, state = _find(path)
    wanted = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in keep}
    # Not of this project's own shards, whose order would not be the one that a checkpoint knows.
    foreign = not all(_SHARD.fullmatch(tar.rsplit("/", 1)[-1]) for tar in tars)
    known_by = [_ARRAYS, tars, state, wanted, *([rule] if foreign else [])]
    key = hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:32]
    folder = cache.folder / f"index-{key}"
    if not folder.exists():
        with FileLock(cache.folder / "index.lock"):
            if not folder.exists():
                _save(folder, _read_all(path, tars, keep, rule, cache))
    return Index.load(folder)


def shows_any(path: str, keep: Filter) -> bool | None:
    """Whether a source has a wanted sample; reads sidecars up to the first that has. None for tars without, of which
    only reading tells. Raises ShardError."""
    tars, _ = _find(path)
    for tar in tars:
        manifest = retried(_manifest_of, tar)
        if manifest is None:
            return None
        _, ranges, _ = retried(_read_ours, tar, manifest, keep)
        if len(ranges):
            return True
    return False


def check_there(path: str) -> None:
    """Raises ShardError where there is nothing to stream from, without opening a tar."""
    _find(path)


def _find(path: str) -> tuple[list[str], list[str]]:
    """The tars of a source, in order, and what changes when one of them does."""
    urls = list(braceexpand(path)) if "{" in path else [path]
    fs, inner = file_system(urls[0], ShardError)
    infos = _listed(path, urls, fs, inner) if is_local(fs) else retried(_listed, path, urls, fs, inner)
    infos = sorted((i for i in infos if _name(i).endswith(".tar")), key=lambda i: i["name"])
    if not infos:
        raise ShardError(f"{path}: no shards here; `make dataset` writes them, and any WebDataset tars will do")
    tars = [os.path.abspath(i["name"]) if is_local(fs) else fs.unstrip_protocol(i["name"]) for i in infos]
    return tars, [tokenize(i) for i in infos]


def _listed(path: str, urls: Sequence[str], fs: Any, inner: str) -> list[dict[str, Any]]:
    """What fsspec says of the files that a path names, tars or not."""
    with named_errors(path, ShardError):
        if len(urls) > 1:
            return [fs.info(fs._strip_protocol(url)) for url in urls]
        if "*" in path:
            return list(fs.glob(inner, detail=True).values())
        if inner.endswith(".tar"):
            return [fs.info(inner)]
        infos: list[dict[str, Any]] = fs.ls(inner, detail=True)
        ours = [i for i in infos if _MANIFEST.fullmatch(_name(i))]
        if not ours:
            return infos
        # A tar without its manifest is no shard.
        return [{**i, "name": i["name"].removesuffix(".manifest.json") + ".tar"} for i in ours]


def _name(info: dict[str, Any]) -> str:
    return str(info["name"]).rsplit("/", 1)[-1]


Part = tuple[ShardFile, NDArray[np.int64], NDArray[np.int32]]
"""A shard; (n, 2) offset and size of its wanted samples; and (n, 2) height and width of their images, zeros where they
are not known."""


def _read_all(path: str, tars: list[str], keep: Filter, rule: KeyRule, cache: ShardCache) -> list[Part]:
    with ThreadPoolExecutor(_READERS) as pool:
        parts = pool.map(lambda tar: _read(tar, keep, rule, cache), tars)
        console = Console(stderr=True)
        quiet = len(tars) < _PROGRESS_FROM or not console.is_terminal
        return list(track(parts, f"index of {path}", len(tars), console=console, transient=True, disable=quiet))


def _read(tar: str, keep: Filter, rule: KeyRule, cache: ShardCache) -> Part:
    manifest = retried(_manifest_of, tar)
    if manifest is not None:
        return retried(_read_ours, tar, manifest, keep)
    if keep != Filter():
        raise ShardError(f"{tar}: filters need the manifest and sidecar that `sdd dataset` writes; there are none")
    return _read_foreign(tar, rule, cache)


def _manifest_of(tar: str) -> Manifest | None:
    folder, name = tar.rsplit("/", 1)
    ours = _MANIFEST.fullmatch(name.removesuffix(".tar") + ".manifest.json")
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
            sidecar = sidecar.filter(pa.array(keep.keeps(sidecar)))
            start = sidecar["image_offset"].to_numpy() - tarfile.BLOCKSIZE
            end = sidecar["json_offset"].to_numpy() + sidecar["json_size"].to_numpy()
            shapes = np.stack([pc.fill_null(sidecar[n], 0).to_numpy() for n in ("height", "width")], 1, dtype=np.int32)
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{path}: damaged ({one_line(error)}); make this shard again") from None
    ranges = np.stack([start, end - start], axis=1)
    if not _lie_within(ranges, manifest.tar.size):
        raise ShardError(f"{path}: has samples where its tar has none; make this shard again")
    return ShardFile(tar, manifest.tar.size, manifest.tar.sha256), ranges, shapes


def _read_foreign(tar: str, rule: KeyRule, cache: ShardCache) -> Part:
    """A tar without manifest: its samples are found by its headers, and written down beside it."""
    shard, index = retried(_look_up, tar)
    if index is not None and _marks(shard, rule).items() <= _told(index).items():
        ranges = np.stack([index["offset"].to_numpy(), index["size"].to_numpy()], axis=1)
        if _lie_within(ranges, shard.size):
            return replace(shard, key_rule=_told(index)["found_key_rule"]), ranges, _unknown_shapes(ranges)
    found, ranges = _scan(shard, cache, rule)
    shard = replace(shard, key_rule=found)
    if found != rule and found == "last_dot":
        warnings.warn(
            f"{tar}: keys end at the last dot of a name, since at the first one, as in WebDataset, images would share "
            "a key; Source(key_rule='first_dot') if they belong together",
            stacklevel=2,
        )
    marks = {**_marks(shard, rule), "found_key_rule": found}
    table = pa.table({"offset": ranges[:, 0], "size": ranges[:, 1]}, metadata=marks)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    folder, name = tar.rsplit("/", 1)
    # Where nothing can be written (http, a folder of someone else's) this machine's cache alone has the index.
    with contextlib.suppress(RunError, NotImplementedError):
        Store(folder).put(name + INDEX_SUFFIX, sink.getvalue().to_pybytes())
    return shard, ranges, _unknown_shapes(ranges)


def _unknown_shapes(ranges: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.zeros((len(ranges), 2), np.int32)


def _lie_within(ranges: NDArray[Any], size: int) -> bool:
    """Whether (n, 2) offset and size are places in a file of so many bytes: what lies beside a tar can be anybody's."""
    starts, sizes = ranges.T
    fits = (starts >= 0) & (starts <= size) & (sizes > 0) & (sizes <= size - starts)
    return np.issubdtype(ranges.dtype, np.integer) and bool(fits.all())


def _marks(shard: ShardFile, rule: KeyRule) -> dict[str, str]:
    """What an index is of. One that an earlier release wrote has no rule, and is written again."""
    return {"size": str(shard.size), "key_rule": rule}


def _told(index: pa.Table) -> dict[str, Any]:
    return {key.decode(): value.decode() for key, value in (index.schema.metadata or {}).items()}


def _look_up(tar: str) -> tuple[ShardFile, pa.Table | None]:
    """A tar, and the index that lies beside it."""
    fs, inner = file_system(tar, ShardError)
    with named_errors(tar, ShardError):
        shard = ShardFile(tar, int(fs.info(inner)["size"]), None)
    try:
        with named_errors(tar + INDEX_SUFFIX, ShardError):
            index = pq.ParquetFile(pa.BufferReader(fs.cat_file(inner + INDEX_SUFFIX))).read()
            return shard, index if {"offset", "size"} <= set(index.column_names) else None
    except pa.ArrowException:  # it is found anew
        return shard, None
    except ShardError as error:
        if not is_missing(error):
            raise
        return shard, None


def _scan(shard: ShardFile, cache: ShardCache, rule: KeyRule) -> tuple[KeyRule, NDArray[np.int64]]:
    """What the rule means for this tar, and (n, 2) offset and size of every sample of it. Raises ShardError for samples
    that cannot be read in one go."""
    names: list[str] = []
    ranges: list[tuple[int, int]] = []
    links: dict[int, str] = {}
    with os.fdopen(cache.open(shard), "rb") as file:
        try:
            for member in tar_headers(file):
                if is_clutter(member.name) or not (member.isreg() or member.islnk() or member.issym()):
                    continue
                if not member.isreg():
                    links[len(names)] = member.name
                names.append(member.name)
                ranges.append((member.offset, member.offset_data + (member.size if member.isreg() else 0)))
        except (tarfile.TarError, EOFError) as error:
            raise ShardError(f"{shard.url}: not a whole tar ({error}); {_what_to_do(shard, cache)}") from None
    if rule == "auto":
        rule = rule_for(names)
    samples = group_members(names, rule)
    for sample in samples:
        _check_readable(shard, sample, next((links[n] for n in sample.members if n in links), None))
    found = [(ranges[s.members[0]][0], ranges[s.members[-1]][1]) for s in samples]
    return rule, np.array([(start, end - start) for start, end in found], np.int64).reshape(-1, 2)


def _what_to_do(shard: ShardFile, cache: ShardCache) -> str:
    with os.fdopen(cache.open(shard), "rb") as file:
        return "decompress it: the stream reads at random" if is_compressed(file) else "fetch it again"


def _check_readable(shard: ShardFile, sample: Group, link: str | None) -> None:
    """Raises ShardError for a sample that is not one stretch of the tar."""
    if link is not None:
        raise ShardError(f"{shard.url}: {link} is a link; unpack it, and pack it again with tar --dereference")
    if not sample.together:
        raise ShardError(
            f"{shard.url}: the members of {sample.key} do not stand together; unpack it, and pack it again with tar "
            "--sort=name"
        )
    if not sample.clear:
        raise ShardError(
            f"{shard.url}: the key {sample.key} comes several times, mixed up; give every sample a key of its own"
        )


def _save(folder: Path, parts: list[Part]) -> None:
    ranges = np.concatenate([part for _, part, _ in parts])
    with whole_folder(folder) as draft:
        np.save(draft / "first.npy", np.cumsum([0, *(len(part) for _, part, _ in parts)]))
        np.save(draft / "offsets.npy", ranges[:, 0])
        np.save(draft / "sizes.npy", ranges[:, 1])
        np.save(draft / "shapes.npy", np.concatenate([shapes for _, _, shapes in parts]))
        (draft / "shards.json").write_text(json.dumps([asdict(shard) for shard, _, _ in parts]))
