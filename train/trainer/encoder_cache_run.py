"""Computes beforehand what the frozen encoders give: on Ray, shard by shard, so that what is there already is not
computed again."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util import ActorPool

from datapipe.cluster import connected
from datapipe.shards import Store
from model.base import load_image_encoder, load_vae
from subject_diffusion.errors import RunError, SddError, one_line
from train.stream.buckets import BucketedOrder, Shape
from train.stream.cache import ShardCache, ShardFile
from train.stream.dataset import CACHE, CACHE_BYTES, Stream
from train.trainer.encoder_cache import CacheFolder, Kind, latent_folders, reference_folders
from train.trainer.encoder_cache_writer import CacheWriter
from train.trainer.launch import cpus_of_each, device_here, device_of_cluster
from train.trainer.logging import terminal_progress
from train.trainer.model_folder import model_folder
from train.trainer.recipe import TrainRecipe

Shapes = Mapping[Shape, Shape] | None
"""Which shape stands for each of the buckets'; None: there are none."""
Work = tuple[CacheFolder, ShardFile]


def fill_caches(recipe: TrainRecipe, ray_address: str | None = None, cache: Path = CACHE) -> dict[Kind, int]:
    """Computes what is missing of a recipe's crops and of the draws of its references, `run.workers` shards at once.
    Returns how many shards that were, of each that the recipe has. Raises SddError."""
    folders, shapes = _folders(recipe, cache)
    counts: dict[Kind, int] = {folder.kind: 0 for folder in folders}
    with contextlib.ExitStack() as held:
        for folder in folders:
            held.enter_context(Store(folder.url).lock())
            Store(folder.url).clear_temporaries()
        work = [(folder, shard) for folder in folders for shard in folder.missing()]
        for folder, _ in work:
            counts[folder.kind] += 1
        display = held.enter_context(terminal_progress(len(work), "cache"))
        write = _written_here if recipe.run.workers == 1 else functools.partial(_written_on_ray, ray_address)
        for done, _ in enumerate(write(recipe, shapes, cache, work) if work else (), 1):
            display.advance_to(done)
    return counts


def _folders(recipe: TrainRecipe, cache: Path) -> tuple[list[CacheFolder], Shapes]:
    stream: Stream[Any] = Stream(
        recipe.sources,
        recipe.optimizer.batch_size,
        rank=0,
        ranks=1,
        cache=cache,
        buckets=recipe.examples.buckets,
    )
    order = stream.plan.order
    found = []
    if recipe.examples.crops is not None:
        found += latent_folders(recipe, load_vae(model_folder("base", recipe.base)), stream)
    if recipe.examples.reference.draws is not None:
        encoder = load_image_encoder(model_folder("image_encoder", recipe.image_encoder), None)
        found += reference_folders(recipe, *encoder, recipe.sources, ShardCache(stream.plan.cache, CACHE_BYTES))
    unique = {folder.url: folder for folder in found}.values()  # a source may come twice
    return list(unique), order.joined if isinstance(order, BucketedOrder) else None


def _written_here(recipe: TrainRecipe, shapes: Shapes, cache: Path, work: Sequence[Work]) -> Iterator[None]:
    writer = CacheWriter(recipe, shapes, device_here(recipe), cache, os.getcwd())
    for folder, shard in work:
        writer.write(folder, shard)
        yield


def _written_on_ray(
    address: str | None, recipe: TrainRecipe, shapes: Shapes, cache: Path, work: Sequence[Work]
) -> Iterator[None]:
    with connected(address):
        device = device_of_cluster(recipe, address)
        gpus = 1 if device.type == "cuda" else 0
        kind = ray.remote(CacheWriter).options(num_cpus=cpus_of_each(address), num_gpus=gpus)
        workers = min(recipe.run.workers, len(work))
        pool = ActorPool([kind.remote(recipe, shapes, device, cache, os.getcwd()) for _ in range(workers)])
        try:
            yield from pool.map_unordered(lambda writer, one: writer.write.remote(*one), work)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SddError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise RunError(f"a process of `sdd cache` died ({one_line(error)}); run it again") from None
