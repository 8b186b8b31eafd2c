"""Computes what the frozen encoders give for one shard after another, in any process; in float32, whatever the run's
precision: it is done once, and Stable Diffusion XL's own VAE overflows in narrower types."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datapipe.schema import Entity
from datapipe.shards import Store
from model.base import load_image_encoder, load_vae
from model.latents import posterior
from model.reference import encode_references
from subject_diffusion.storage import no_room, temporary_file
from train.stream.buckets import Shape
from train.stream.cache import CHUNK, ShardFile
from train.stream.dataset import Stream
from train.stream.loader import StreamLoader
from train.stream.order import crop_draws, reference_draws
from train.stream.reader import BatchBase
from train.stream.tar_sample import RawSample
from train.stream.transform import SubjectTransform
from train.trainer.encoder_cache import CacheFolder, file_of
from train.trainer.model_folder import model_folder
from train.trainer.recipe import TrainRecipe
from train.trainer.references import draw_reference, stored_mask

_Image = NDArray[np.uint8]


class CacheWriter:
    """Has the encoders, and computes what they give for one shard after another."""

    def __init__(
        self, recipe: TrainRecipe, shapes: Mapping[Shape, Shape] | None, device: torch.device, cache: Path, folder: str
    ) -> None:
        """shapes: for each shape of the buckets, the one that stands for it. folder: where relative paths start."""
        if os.path.isdir(folder):  # Ray's workers have one of their own
            os.chdir(folder)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        self._recipe, self._shapes, self._device, self._cache = recipe, shapes, device, cache

    def write(self, folder: CacheFolder, shard: ShardFile) -> None:
        """Writes the file of a shard, whole or not at all. Raises SddError."""
        encoder = self._latents if folder.kind == "latents" else self._references
        waiting: dict[str, list[Tensor]] = defaultdict(list)
        with _Tensors() as tensors:
            for names, images in _by_shape(self._images(encoder, folder, shard), self._recipe.run.micro_batch):
                for part, outputs in encoder.encode(torch.from_numpy(np.stack(images)).to(self._device)).items():
                    for name, output in zip(names, outputs.half().cpu(), strict=True):
                        waiting[name + part].append(output)
                        if len(waiting[name + part]) == encoder.draws:
                            tensors.add(name + part, torch.stack(waiting.pop(name + part)))
            tensors.put(Store(folder.url), file_of(shard))

    @functools.cached_property
    def _latents(self) -> _Latents:
        return _Latents(self._recipe, self._shapes, self._device)

    @functools.cached_property
    def _references(self) -> _References:
        return _References(self._recipe, self._device)

    def _images(
        self, encoder: _Latents | _References, folder: CacheFolder, shard: ShardFile
    ) -> Iterator[tuple[str, _Image]]:
        """Name and pixels of everything to encode; what is corrupt is left out, as training does."""
        source = dataclasses.replace(folder.source, path=shard.url, keep=folder.keep, weight=None, epochs=1.0)
        stream: Stream[_ToEncode] = Stream([source], 1, encoder, mode="evaluate", rank=0, ranks=1, cache=self._cache)
        for batch in StreamLoader(stream, self._recipe.run.loader_workers):
            if not batch["replaced"]:
                yield from zip(batch["names"][0], batch["images"][0].numpy(), strict=True)


class _ToEncode(BatchBase):
    names: list[list[str]]
    """One list of n."""
    images: Tensor
    """(1, n, 3, H, W)."""


class _Latents:
    """The VAE, and a transform of the stream: all crops of an image."""

    def __init__(self, recipe: TrainRecipe, shapes: Mapping[Shape, Shape] | None, device: torch.device) -> None:
        self.draws = recipe.examples.crops or 0
        self._vae = load_vae(model_folder("base", recipe.base)).to(device)
        self._cut = SubjectTransform(size_px=recipe.examples.size_px)
        self._buckets, self._shapes = recipe.examples.buckets, shapes

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> dict[str, Any]:
        if self._buckets is not None and self._shapes is not None:
            sample = raw.annotation()
            (place,) = self._buckets.nearest(np.array([[sample.height, sample.width]], np.int32))
            raw = dataclasses.replace(raw, shape=self._shapes[self._buckets.every_shape()[place]])
        crops = [self._cut(raw, crop_draws(raw.key, k))["image"] for k in range(self.draws)]
        return {"names": [raw.key] * self.draws, "images": np.stack(crops)}

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """(n, 3, H, W) uint8 RGB -> by the end of its name, (n, …)."""
        return {"": posterior(self._vae, images)}


class _References:
    """The image encoder, and a transform of the stream: all references of every entity that is wanted."""

    def __init__(self, recipe: TrainRecipe, device: torch.device) -> None:
        self._settings = recipe.examples.reference
        self.draws = self._settings.draws or 0
        encoder, processor = load_image_encoder(model_folder("image_encoder", recipe.image_encoder))
        self._encoder, self._side_px = encoder.to(device), int(encoder.config.image_size)
        self._scale = [torch.tensor(values, device=device) for values in (processor.image_mean, processor.image_std)]

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> dict[str, Any]:
        image, every = raw.image(), raw.every_entity()
        wanted = raw.keep.entities(every)
        names, drawn = [], [np.zeros((0, 3, self._side_px, self._side_px), np.uint8)]
        for number, entity in enumerate(every):
            if entity in wanted:
                try:
                    drawn.append(self._drawn(image, entity, raw.key, number))
                except Exception:  # training comes upon it as well, and says what is wrong with this sample
                    continue
                names += [f"{raw.key}/{number}"] * self.draws
        return {"names": names, "images": np.concatenate(drawn)}

    def _drawn(self, image: _Image, entity: Entity, key: str, number: int) -> NDArray[np.uint8]:
        mask = stored_mask(image, entity)
        rngs = (reference_draws(key, number, draw) for draw in range(self.draws))
        return np.stack([draw_reference(self._settings, image, mask, self._side_px, rng) for rng in rngs])

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """(n, 3, S, S) uint8 RGB -> by the end of its name, (n, …)."""
        present = torch.ones(len(images), 1, dtype=torch.bool, device=images.device)
        classes, patches = encode_references(self._encoder, images[:, None], present, *self._scale)
        return {"/classes": classes[:, 0], "/patches": patches[:, 0]}


class _Tensors:
    """A safetensors file that is written tensor by tensor: a shard's may be larger than memory."""

    def __init__(self) -> None:
        self._data = temporary_file()
        self._header: dict[str, Any] = {}

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """tensor: float16, on the CPU. Raises RunError where there is no room."""
        start = self._data.tell()
        try:
            self._data.write(tensor.numpy().tobytes())
        except OSError as error:
            raise no_room(error) from None
        offsets = [start, self._data.tell()]
        self._header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": offsets}

    def put(self, store: Store, name: str) -> None:
        header = json.dumps(self._header).encode()
        header += b" " * (-len(header) % 8)
        self._data.seek(0)
        with store.writing(name) as file:
            file.write(struct.pack("<Q", len(header)) + header)
            while chunk := self._data.read(CHUNK):
                file.write(chunk)


def _by_shape(samples: Iterator[tuple[str, _Image]], most: int) -> Iterator[tuple[list[str], list[_Image]]]:
    """Names and images, up to `most` of one shape at a time."""
    waiting: dict[tuple[int, ...], tuple[list[str], list[_Image]]] = defaultdict(lambda: ([], []))
    for name, image in samples:
        names, images = waiting[image.shape]
        names.append(name)
        images.append(image)
        if len(names) == most:
            yield waiting.pop(image.shape)
    yield from waiting.values()
