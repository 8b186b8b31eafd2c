"""A recipe's datasets as endless batches of training examples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from model import SubjectDiffusion
from model.reference import encoded_shapes
from subject_diffusion.errors import RunError
from train.stream.cache import ShardCache
from train.stream.dataset import CACHE_BYTES, Stream
from train.stream.loader import StreamLoader
from train.trainer.encoder_cache import CachedOutputs, CachedReferences, latent_folders, reference_folders
from train.trainer.examples import ExampleBatch, TrainingExamples, check_entities
from train.trainer.identities import Pairs
from train.trainer.recipe import TrainRecipe

HELD_OUT_IMAGES = 64
"""At least so many, where there are as many."""


def open_pairs(recipe: TrainRecipe, cache: Path) -> Pairs:
    """The identities that the recipe's datasets know of. Raises SddError, also where there are no entities."""
    shards = ShardCache(cache.expanduser(), CACHE_BYTES)
    check_entities(recipe.sources)
    return Pairs(recipe.sources, shards)


def open_loader(
    recipe: TrainRecipe, model: SubjectDiffusion, pairs: Pairs, cache: Path, ranks: int, pin_memory: bool
) -> StreamLoader[ExampleBatch]:
    """Micro-batches of this rank. Raises SddError."""
    examples = _examples(recipe, model, pairs)
    stream: Stream[ExampleBatch] = Stream(
        recipe.sources,
        ranks * recipe.run.micro_batch,
        examples,
        seed=recipe.seed,
        window=recipe.window,
        cache=cache,
        buckets=recipe.examples.buckets,
        samples_per_step=recipe.optimizer.batch_size,
    )
    shards = ShardCache(cache.expanduser(), CACHE_BYTES)
    if recipe.run.cached_latents:
        examples.latents = CachedOutputs(latent_folders(recipe, model.vae, stream), shards)
    if recipe.run.cached_references:
        encoder, processor = model.image_encoder, model.image_processor
        folders = reference_folders(recipe, encoder, processor, recipe.sources, shards)
        examples.references = CachedReferences(CachedOutputs(folders, shards), encoded_shapes(encoder))
    return StreamLoader(stream, recipe.run.loader_workers, pin_memory=pin_memory)


def through_epochs(loader: StreamLoader[ExampleBatch]) -> Iterator[ExampleBatch]:
    while True:
        yield from loader


def held_out_batches(recipe: TrainRecipe, model: SubjectDiffusion, path: str, cache: Path) -> Iterator[ExampleBatch]:
    """The first images of a dataset, the same ones with the same draws at every call. Raises SddError."""
    size = recipe.run.micro_batch
    stream: Stream[ExampleBatch] = Stream(
        path, size, _examples(recipe, model), mode="evaluate", rank=0, ranks=1, cache=cache
    )
    return itertools.islice(stream, -(-HELD_OUT_IMAGES // size))


def _examples(recipe: TrainRecipe, model: SubjectDiffusion, pairs: Pairs | None = None) -> TrainingExamples:
    examples, factor = recipe.examples, model.latent_factor
    sides = {"size_px": examples.size_px}
    if examples.buckets is not None:
        sides["buckets.step_px"] = examples.buckets.step_px
    for key, side in sides.items():
        if side % factor:
            raise RunError(f"examples.{key} {side}: the base's autoencoder takes multiples of {factor}")
    channels = model.vae.config.latent_channels
    return TrainingExamples(examples, recipe.model.max_subjects, model.reference_size, channels, factor, pairs)
