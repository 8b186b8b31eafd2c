"""Pictures that a finished run draws for a user's prompt and references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from datapipe.errors import RunError
from datapipe.images import FORMATS
from datapipe.settings import validated
from model import Subject, SubjectDiffusionPipeline
from model.subject import Box
from train.launch import read_recipe
from train.loop import PIPELINE
from train.recipe import TrainRecipe, ValidationSettings
from train.validation import generators


def sample_run(
    run: Path,
    prompt: str,
    subjects: Sequence[Subject],
    seed: int,
    count: int,
    size: tuple[int | None, int | None] = (None, None),
    overrides: Sequence[str] = (),
) -> list[Image.Image]:
    """`count` pictures, of the seeds `seed`, `seed + 1`, …, drawn as the run's validation grids are.

    size: (height, width) in pixels; None: the base's own. overrides: of ValidationSettings (`guidance_scale=7.5`).
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


def load_subject(tag: str, image: Path, mask: Path | None = None, box: Box | None = None) -> Subject:
    """A subject of picture files. Without a mask file the picture's own transparency is its mask. Raises RunError."""
    picture = _open(image)
    if mask is not None:
        return Subject(picture.convert("RGB"), tag, mask=_open(mask), box=box)
    opaque = np.asarray(picture.convert("RGBA"))[..., 3] >= 128 if picture.has_transparency_data else None
    return Subject(picture.convert("RGB"), tag, mask=opaque, box=box)


def finished_pipeline(run: Path) -> Path:
    """Raises RunError where the training has not ended."""
    if not (run / PIPELINE).exists():
        raise RunError(f"{run}: its training has not ended, so it has no pipeline yet; go on with `sdd train`")
    return run / PIPELINE


def sampling_device(recipe: TrainRecipe) -> torch.device:
    """The GPU, where there is one and the run would use it."""
    return torch.device("cuda" if recipe.run.device != "cpu" and torch.cuda.is_available() else "cpu")


def _open(path: Path) -> Image.Image:
    """Upright."""
    try:
        picture = Image.open(path, formats=FORMATS)
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises of bad bytes
        raise RunError(f"{path}: not a picture that can be read ({error})") from None
    return ImageOps.exif_transpose(picture)
