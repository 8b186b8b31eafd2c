"""Latents computed beforehand: what the VAE takes an image's crops for, in files beside the shards.

out/toy/latents-1f0c2a9b7d3e5f60/
    shard-000012-9a3185c0e4b7d261.safetensors   KEY/0, KEY/1, …: (2, C, h, w) float16, mean and standard deviation

The folder's name is a hash of the VAE and of all that decides what is cut, the file's has its shard's: where something
has changed, nothing is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from datapipe.shards import Store
from subject_diffusion.errors import RunError, ShardError
from subject_diffusion.storage import file_system, named_errors
from train.stream.buckets import BucketedOrder
from train.stream.cache import ShardCache, ShardFile
from train.stream.dataset import Stream
from train.stream.filter import Filter
from train.stream.source import Source
from train.stream.tar_sample import RawSample
from train.trainer.recipe import TrainRecipe
from train.trainer.resume import frozen_fingerprint

_FOLDER = "latents-"
_OPEN = 64  # files


@dataclass(frozen=True)
class LatentFolder:
    """Where the latents of a source lie, and the shards that have samples."""

    source: Source
    name: str
    shards: Sequence[ShardFile]

    @property
    def dataset(self) -> Store:
        return Store(self.source.path, create=False)

    @property
    def url(self) -> str:
        """The same from any working directory."""
        return f"{self.dataset.url.rstrip('/')}/{self.name}"

    def missing(self) -> list[ShardFile]:
        """The shards whose latents are not there. Raises RunError."""
        there = set(Store(self.url).names()) if self.dataset.exists(self.name) else set()
        return [shard for shard in self.shards if file_of(shard) not in there]

    def others(self) -> list[str]:
        """Folders of latents of another VAE, or of other crops."""
        return [n for n in self.dataset.names() if n.startswith(_FOLDER) and n != self.name]


def latent_folders(recipe: TrainRecipe, vae: AutoencoderKL, stream: Stream[Any]) -> list[LatentFolder]:
    """Of each source of a training's stream. Raises RunError where one is no dataset's folder."""
    order, examples = stream.plan.order, recipe.examples
    shapes: Any = sorted(order.joined.items()) if isinstance(order, BucketedOrder) else examples.size_px
    known_by = [frozen_fingerprint(vae), examples.crops, shapes]
    folders = []
    for source, index in zip(stream.plan.sources, stream.plan.indices, strict=True):
        if any(shard.sha256 is None for shard in index.shards) or source.path.endswith(".tar"):
            raise RunError(f"{source.path}: latents lie beside the shards of `sdd dataset`; name their folder")
        digest = hashlib.sha256(json.dumps([*known_by, source.keep.fingerprint]).encode()).hexdigest()[:16]
        with_samples = np.flatnonzero(np.diff(index.first)).tolist()
        folders.append(LatentFolder(source, f"{_FOLDER}{digest}", [index.shards[n] for n in with_samples]))
    return folders


def file_of(shard: ShardFile) -> str:
    """The name of the file with a shard's latents."""
    return f"{shard.name.removesuffix('.tar')}-{(shard.sha256 or '')[:16]}.safetensors"


def check_complete(folders: Iterable[LatentFolder]) -> None:
    """Raises RunError where latents are missing."""
    for folder in folders:
        missing = folder.missing()
        if missing:
            others = folder.others()
            stale = f" ({others[0]} is of another VAE or other crops)" if others else ""
            raise RunError(
                f"{folder.source.path}: latents of {len(missing)} of {len(folder.shards)} shards are missing{stale}; "
                "compute them with `sdd cache`, or set run.cached_latents=false"
            )


class CachedLatents:
    """Reads them, in any process."""

    def __init__(self, folders: Sequence[LatentFolder], cache: ShardCache) -> None:
        """Raises RunError where latents are missing."""
        check_complete(folders)
        self._urls: dict[tuple[str, Filter], str] = {(f.source.path, f.source.keep): f.url for f in folders}
        self._cache = cache
        self._files: OrderedDict[str, _LatentFile] = OrderedDict()

    def read(self, raw: RawSample, crop: int, shape: tuple[int, ...]) -> NDArray[np.float16]:
        """(2, C, h, w) of a sample's crop. Raises ShardError."""
        assert raw.shard is not None
        url = f"{self._urls[raw.source, raw.keep]}/{file_of(raw.shard)}"
        if url not in self._files:
            self._files[url] = _LatentFile(url, self._cache)
            if len(self._files) > _OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(url)
        return self._files[url].read(f"{raw.key}/{crop}", shape)


class _LatentFile:
    """An open safetensors file, whose tensors are read one by one."""

    def __init__(self, url: str, cache: ShardCache) -> None:
        self._url = url
        fs, inner = file_system(url, ShardError)
        with named_errors(url, ShardError):
            size = int(fs.info(inner)["size"])
        self._descriptor = cache.open(ShardFile(url, size, None))
        try:
            (header,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
            self._start = 8 + header
            self._tensors = json.loads(os.pread(self._descriptor, min(header, size), 8))
        except (ValueError, struct.error):
            raise self._damaged() from None

    def read(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float16]:
        wanted = int(np.prod(shape)) * 2
        try:
            start, end = self._tensors[name]["data_offsets"]
            found = os.pread(self._descriptor, wanted, self._start + start)
            if end - start != wanted or self._tensors[name]["shape"] != list(shape):
                raise self._damaged()
            return np.frombuffer(found, np.float16).reshape(shape)
        except (KeyError, TypeError, ValueError, OSError):
            raise self._damaged() from None

    def close(self) -> None:
        os.close(self._descriptor)

    def _damaged(self) -> ShardError:
        return ShardError(f"{self._url}: no latents, or not those of its shard; remove it, and run `sdd cache`")
