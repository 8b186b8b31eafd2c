"""What the frozen encoders give, computed beforehand, in files beside the shards: latents of the images' crops, and
encodings of the references.

out/toy/latents-1f0c2a9b7d3e5f60/
    shard-000012-9a3185c0e4b7d261.safetensors   KEY: (K, 2, C, h, w), mean and standard deviation of K crops
out/toy/references-5b1f7be20a64c9d3/
    shard-000012-9a3185c0e4b7d261.safetensors   KEY/N/classes: (K, D), KEY/N/patches: (K, P, W), of the N-th entity

All float16. The folder's name is a hash of the encoder and of all that decides what it sees, the file's has its
shard's: where something has changed, nothing is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from train.stream.shard_index import Index, open_index
from train.stream.source import Source
from train.stream.tar_sample import RawSample
from train.trainer.identities import knows_identities
from train.trainer.recipe import TrainRecipe
from train.trainer.references import photos
from train.trainer.resume import frozen_fingerprint

Kind = Literal["latents", "references"]

_DEPENDS_ON: dict[Kind, str] = {
    "latents": "another VAE, or other crops, shapes or filter",
    "references": "another encoder, or other draws or filter",
}
_OPEN = 64  # files
_FORMAT = 2  # of a file; of 1, each crop was a tensor of its own


@dataclass(frozen=True)
class CacheFolder:
    """Where what an encoder gives for a source lies. keep: the samples and entities that it is computed for; shards:
    those that have such samples."""

    kind: Kind
    source: Source
    keep: Filter
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
        """The shards of which there is no file. Raises RunError."""
        there = set(Store(self.url).names()) if self.dataset.exists(self.name) else set()
        return [shard for shard in self.shards if file_of(shard) not in there]

    def others(self) -> list[str]:
        """Folders of the same kind, which depend on something else."""
        return [n for n in self.dataset.names() if n.startswith(f"{self.kind}-") and n != self.name]


def latent_folders(recipe: TrainRecipe, vae: AutoencoderKL, stream: Stream[Any]) -> list[CacheFolder]:
    """Of each source of a training's stream. Raises RunError where one is no dataset's folder."""
    order, examples = stream.plan.order, recipe.examples
    shapes: Any = sorted(order.joined.items()) if isinstance(order, BucketedOrder) else examples.size_px
    known_by = [frozen_fingerprint(vae), examples.crops, shapes]
    plan = zip(stream.plan.sources, stream.plan.indices, strict=True)
    return [_folder("latents", known_by, source, source.keep, index) for source, index in plan]


def reference_folders(
    recipe: TrainRecipe, image_encoder: Any, processor: Any, sources: Sequence[Source], cache: ShardCache
) -> list[CacheFolder]:
    """Of each source. Where a dataset tells of the same subject in several images, of all that it has: the filter wants
    the images that are learned, not those that references come from. Raises SddError."""
    settings = recipe.examples.reference
    drawn = settings.model_dump(mode="json", exclude={"photos", "cross_image"})
    behind = photos(settings.photos).fingerprint if settings.background == "photo" else None
    seen = [list(processor.image_mean), list(processor.image_std)]
    known_by = [frozen_fingerprint(image_encoder), seen, drawn, behind]
    folders = []
    for source in sources:
        keep = Filter() if settings.cross_image and knows_identities(source.path) else source.keep
        index = open_index(source.path, keep, cache, source.key_rule)
        folders.append(_folder("references", known_by, source, keep, index))
    return folders


def _folder(kind: Kind, known_by: list[Any], source: Source, keep: Filter, index: Index) -> CacheFolder:
    if any(shard.sha256 is None for shard in index.shards) or source.path.endswith(".tar"):
        raise RunError(f"{source.path}: {kind} lie beside the shards of `sdd dataset`; name their folder")
    digest = hashlib.sha256(json.dumps([_FORMAT, *known_by, keep.fingerprint]).encode()).hexdigest()[:16]
    with_samples = np.flatnonzero(np.diff(index.first)).tolist()
    return CacheFolder(kind, source, keep, f"{kind}-{digest}", [index.shards[n] for n in with_samples])


def file_of(shard: ShardFile) -> str:
    """The name of a shard's file."""
    return f"{shard.name.removesuffix('.tar')}-{(shard.sha256 or '')[:16]}.safetensors"


def check_complete(folders: Iterable[CacheFolder]) -> None:
    """Raises RunError where files are missing."""
    for folder in folders:
        missing = folder.missing()
        if missing:
            others = folder.others()
            stale = f" ({others[0]} is of {_DEPENDS_ON[folder.kind]})" if others else ""
            raise RunError(
                f"{folder.source.path}: {folder.kind} of {len(missing)} of {len(folder.shards)} shards are "
                f"missing{stale}; compute them with `sdd cache`, or set run.cached_{folder.kind}=false"
            )


class CachedOutputs:
    """Reads them, in any process."""

    def __init__(self, folders: Sequence[CacheFolder], cache: ShardCache) -> None:
        """Raises RunError where files are missing."""
        check_complete(folders)
        self._urls: dict[tuple[str, Filter], str] = {(f.source.path, f.source.keep): f.url for f in folders}
        self._cache = cache
        self._files: OrderedDict[str, _File] = OrderedDict()

    def read(
        self, raw: RawSample, shard: ShardFile, name: str, draw: int, shape: tuple[int, ...]
    ) -> NDArray[np.float16]:
        """One of the draws of a tensor. shard: where its sample lies, this one or another of the source. Raises
        ShardError."""
        url = f"{self._urls[raw.source, raw.keep]}/{file_of(shard)}"
        if url not in self._files:
            self._files[url] = _File(url, self._cache)
            if len(self._files) > _OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(url)
        return self._files[url].read(name, draw, shape)


class CachedReferences:
    """Reads what references were encoded to. shapes: of each part of it, `classes` and `patches`."""

    def __init__(self, outputs: CachedOutputs, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._outputs, self._shapes = outputs, shapes

    def none(self, slots: int) -> dict[str, NDArray[Any]]:
        return {part: np.zeros((slots, *shape), np.float16) for part, shape in self._shapes.items()}

    def read(self, raw: RawSample, shard: ShardFile, key: str, number: int, draw: int) -> dict[str, NDArray[Any]]:
        """Raises ShardError."""
        shapes = self._shapes.items()
        return {part: self._outputs.read(raw, shard, f"{key}/{number}/{part}", draw, shape) for part, shape in shapes}


class _File:
    """An open safetensors file, whose tensors are read row by row."""

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

    def read(self, name: str, row: int, shape: tuple[int, ...]) -> NDArray[np.float16]:
        wanted = int(np.prod(shape)) * 2
        try:
            start, end = self._tensors[name]["data_offsets"]
            rows, *found = self._tensors[name]["shape"]
            data = os.pread(self._descriptor, wanted, self._start + start + row * wanted)
            if end - start != rows * wanted or found != list(shape) or row >= rows:
                raise self._damaged()
            return np.frombuffer(data, np.float16).reshape(shape)
        except (KeyError, TypeError, ValueError, OSError):
            raise self._damaged() from None

    def close(self) -> None:
        os.close(self._descriptor)

    def _damaged(self) -> ShardError:
        return ShardError(f"{self._url}: damaged, or not of its shard; remove it, and run `sdd cache`")
