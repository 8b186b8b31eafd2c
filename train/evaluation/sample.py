"""Pictures that a finished run draws for a user's prompt and references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from model import Subject, SubjectDiffusionPipeline
from subject_diffusion.settings import validated
from train.trainer.launch import read_recipe
from train.trainer.recipe import TrainRecipe, ValidationSettings
from train.trainer.run_folder import finished_pipeline
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

    size: (height, width) in pixels; default: the base's own.
    overrides: changes to ValidationSettings (`guidance_scale=7.5`).
    Raises SddError.
    """
    recipe = read_recipe(run)
    settings = validated(ValidationSettings, recipe.validation.model_dump(), overrides, "--set")
    pipeline = SubjectDiffusionPipeline.from_pretrained(finished_pipeline(run)).to(sampling_device(recipe))
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


def sampling_device(recipe: TrainRecipe) -> torch.device:
    """The GPU, where there is one and the run would use it."""
    return torch.device("cuda" if recipe.run.device != "cpu" and torch.cuda.is_available() else "cpu")
