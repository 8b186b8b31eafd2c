"""Computes the latents of one shard after another, in any process."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from datapipe.shards import Store
from model.base import load_vae
from model.latents import posterior
from train.stream.buckets import Shape
from train.stream.cache import ShardFile
from train.stream.dataset import Stream
from train.stream.loader import StreamLoader
from train.stream.order import crop_draws
from train.stream.reader import BatchBase
from train.stream.tar_sample import RawSample
from train.stream.transform import SubjectTransform
from train.trainer.latents import LatentFolder, file_of
from train.trainer.model_folder import model_folder
from train.trainer.recipe import TrainRecipe


class LatentWriter:
    """Has the VAE, and computes the latents of one shard after another."""

    def __init__(
        self, recipe: TrainRecipe, shapes: Mapping[Shape, Shape] | None, device: torch.device, cache: Path, folder: str
    ) -> None:
        """shapes: for each shape of the buckets, the one that stands for it. folder: where relative paths start."""
        if os.path.isdir(folder):  # Ray's workers have one of their own
            os.chdir(folder)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        self._recipe, self._cache, self._device = recipe, cache, device
        # In float32, whatever the run's precision: it is done once, and XL's own VAE overflows in narrower types.
        self._vae = load_vae(model_folder("base", recipe.base)).to(device)
        self._crops = _Crops(recipe, shapes)

    def write(self, folder: LatentFolder, shard: ShardFile) -> None:
        """Writes the latents of a shard's samples, whole or not at all. Raises SddError."""
        latents: dict[str, Tensor] = {}
        for names, images in _by_shape(self._samples(folder, shard), self._recipe.run.micro_batch):
            found = posterior(self._vae, torch.from_numpy(np.stack(images)).to(self._device))
            latents |= dict(zip(names, found.half().cpu(), strict=True))
        Store(folder.url).put(file_of(shard), save({name: one.contiguous() for name, one in latents.items()}))

    def _samples(self, folder: LatentFolder, shard: ShardFile) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Name and pixels of every crop; those of corrupt samples are left out, as training does."""
        source = dataclasses.replace(folder.source, path=shard.url, weight=None, epochs=1.0)
        stream: Stream[_CropBatch] = Stream(
            [source], 1, self._crops, mode="evaluate", rank=0, ranks=1, cache=self._cache
        )
        for batch in StreamLoader(stream, self._recipe.run.loader_workers):
            if not batch["replaced"]:
                for crop, image in enumerate(batch["crops"][0].numpy()):
                    yield f"{batch['key'][0]}/{crop}", image


class _CropBatch(BatchBase):
    crops: Tensor
    """(1, K, 3, H, W)."""


class _Crops:
    """A transform of the stream: all crops of an image, (K, 3, H, W) uint8."""

    def __init__(self, recipe: TrainRecipe, shapes: Mapping[Shape, Shape] | None) -> None:
        self._cut = SubjectTransform(size_px=recipe.examples.size_px)
        self._count, self._buckets, self._shapes = recipe.examples.crops or 0, recipe.examples.buckets, shapes

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> dict[str, NDArray[np.uint8]]:
        if self._buckets is not None and self._shapes is not None:
            sample = raw.annotation()
            (place,) = self._buckets.nearest(np.array([[sample.height, sample.width]], np.int32))
            raw = dataclasses.replace(raw, shape=self._shapes[self._buckets.every_shape()[place]])
        return {"crops": np.stack([self._cut(raw, crop_draws(raw.key, k))["image"] for k in range(self._count)])}


def _by_shape(
    samples: Iterator[tuple[str, NDArray[np.uint8]]], most: int
) -> Iterator[tuple[list[str], list[NDArray[np.uint8]]]]:
    """Names and images, up to `most` of one shape at a time."""
    waiting: dict[tuple[int, ...], tuple[list[str], list[NDArray[np.uint8]]]] = defaultdict(lambda: ([], []))
    for name, image in samples:
        names, images = waiting[image.shape]
        names.append(name)
        images.append(image)
        if len(names) == most:
            yield waiting.pop(image.shape)
    yield from waiting.values()
