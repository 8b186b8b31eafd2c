"""What lies in a run's folder, by name. Imports nothing that takes seconds, so that commands can look here before they
load a model."""

from __future__ import annotations

import re
from pathlib import Path

from subject_diffusion.errors import RunError
from subject_diffusion.packaged import local_path
from train.stream.shard_index import check_there
from train.trainer.recipe import TrainRecipe

RECIPE = "recipe.json"
"""The recipe of the run that the folder holds, whole."""
CHECKPOINTS = "checkpoints"
PIPELINE = "pipeline"
WANDB_ID = "wandb-id"
"""Under which Weights & Biases knows the run."""
STOP = "stop"
"""A file of this name asks the run to save and end."""


def check_start(recipe: TrainRecipe, out: Path) -> None:
    """Whether there is what a run begins from, and it can be written to `out`. Raises SddError."""
    if not recipe.sources:
        raise RunError("no data to learn from: name a dataset with --data, or sources in the recipe")
    if re.match(r"\w+:/", str(out)):
        raise RunError(f"--out {out}: a run is written to a local folder; copy its pipeline from there")
    for key, folder in (("base", recipe.base), ("image_encoder", recipe.image_encoder)):
        if not local_path(folder).is_dir():
            raise RunError(f"{key} {folder}: no such folder; download the model there, or set {key} to its folder")
    for source in recipe.sources:
        check_there(source.path)


def finished_pipeline(run: Path) -> Path:
    """Raises RunError where the training has not ended."""
    if not (run / RECIPE).exists():
        raise RunError(f"{run}: no training run of `sdd train`")
    if not (run / PIPELINE).exists():
        raise RunError(f"{run}: its training has not ended, so it has no pipeline yet; go on with `sdd train`")
    return run / PIPELINE
