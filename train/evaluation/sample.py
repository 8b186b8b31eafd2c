"""Pictures that a trained model draws for a user's prompt and references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from model import Subject
from subject_diffusion.settings import validated
from train.trainer.pipeline import open_pipeline, recipe_of
from train.trainer.recipe import TrainRecipe, ValidationSettings
from train.trainer.validation import generators


def sample_run(
    run: Path,
    prompt: str,
    subjects: Sequence[Subject],
    seed: int,
    count: int,
    size: tuple[int | None, int | None] = (None, None),
    overrides: Sequence[str] = (),
) -> list[Image.Image]:
    """`count` pictures from the seeds `seed`, `seed + 1`, …, drawn as the run's validation grids are.

    run: as for `open_pipeline`; without a recipe, the settings of `validation` are the defaults.
    size: (height, width) in pixels; default: the base's own.
    overrides: changes to ValidationSettings (`guidance_scale=7.5`).
    Raises SddError.
    """
    recipe = recipe_of(run)
    settings = validated(ValidationSettings, recipe.validation.model_dump() if recipe else {}, overrides, "--set")
    pipeline = open_pipeline(run).to(sampling_device(recipe))
    images: list[Image.Image] = pipeline(
        prompt,
        subjects=subjects,
        height=size[0],
        width=size[1],
        num_images_per_prompt=count,
        generator=generators(seed, count),
        **settings.sampling(),
    ).images
    return images


def sampling_device(recipe: TrainRecipe | None) -> torch.device:
    """The GPU, where there is one and the run would use it."""
    unwanted = recipe is not None and recipe.run.device == "cpu"
    return torch.device("cuda" if not unwanted and torch.cuda.is_available() else "cpu")
