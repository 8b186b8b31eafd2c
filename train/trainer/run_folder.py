"""What lies in a run's folder, by name. Imports nothing that takes seconds, so that commands can look here before they
load a model."""

from __future__ import annotations

import re
from pathlib import Path

from subject_diffusion.errors import RunError
from subject_diffusion.packaged import local_path
from train.stream.shard_index import check_there
from train.trainer.model_folder import check_model
from train.trainer.recipe import TrainRecipe

OWN_RUN = Path("out/train-toy")
"""Where `make train` trains."""
RECIPE = "recipe.json"
"""The recipe of the run that the folder holds, whole."""
CHECKPOINTS = "checkpoints"
CHECKPOINT_RECORD = "checkpoint.json"
PIPELINE = "pipeline"
NET = "subject_net"
"""The trained part of a pipeline, a folder in its folder."""
WANDB_ID = "wandb-id"
"""Under which Weights & Biases knows the run."""
STOP = "stop"
"""A file of this name asks the run to save and end."""


def check_start(recipe: TrainRecipe) -> None:
    """Whether there is what a run begins from. Raises SddError."""
    if not recipe.sources:
        raise RunError("no data to learn from: name a dataset with --data, or sources in the recipe")
    check_model("base", recipe.base)
    check_model("image_encoder", recipe.image_encoder)
    for source in recipe.sources:
        check_there(source.path)


def trained_model(path: Path) -> Path:
    """Where a trained model lies: the folder of a pipeline, of a checkpoint or of a subject net, or a pipeline on the
    hub. path: one of these, or a run's folder, whose pipeline it is, or the newest checkpoint where the run has not
    ended. Raises RunError."""
    _check_local(path)
    path = local_path(path)
    if is_checkpoint(path) or is_net(path) or (path / "model_index.json").is_file():
        return path
    if (path / PIPELINE).is_dir():
        return path / PIPELINE
    saved = sorted((path / CHECKPOINTS).glob("step-*"))
    if saved:
        return saved[-1]
    if (path / RECIPE).is_file():
        raise RunError(f"{path}: its training has saved nothing yet; go on with `sdd train`")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        return path
    raise RunError(f"{path}: no training run of `sdd train`, and no checkpoint or pipeline of one")


def checkpoint_of(run: Path, step: int) -> Path:
    """The checkpoint of a step. Raises RunError."""
    _check_local(run)
    path = run / CHECKPOINTS / f"step-{step:08d}"
    if not is_checkpoint(path):
        steps = [str(int(p.name.removeprefix("step-"))) for p in sorted((run / CHECKPOINTS).glob("step-*"))]
        there = f"there are {', '.join(steps)}" if steps else "nor of any other"
        raise RunError(f"{run}: no checkpoint of step {step}; {there}")
    return path


def results_folder(path: Path) -> Path:
    """Where what is made with a model goes if nothing else is said: into its run's folder; of a checkpoint or a
    pipeline, which are kept as they are, into `out`, under the names of its run and its own: out/sdd-pipeline. path:
    as for `trained_model`."""
    if (path / CHECKPOINTS).is_dir() or (path / PIPELINE).is_dir():
        return path
    path = path.resolve() if path.exists() else path
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
    return Path("out") / "-".join(filter(None, (run.name, path.name)))


def _check_local(path: Path) -> None:
    # A Path makes one slash of two.
    bucket = re.fullmatch(r"(\w+):/+(.+)", str(path))
    if bucket is not None:
        raise RunError(f"{bucket[1]}://{bucket[2]}: a model is read from a local folder; copy it to this machine first")


def is_net(path: Path) -> bool:
    """Whether a folder holds a subject net alone, and the recipe that names its base: a pipeline's folder without what
    it shares with others."""
    return (path / NET / "config.json").is_file() and not (path / "model_index.json").exists()


def is_checkpoint(path: Path) -> bool:
    return (path / CHECKPOINT_RECORD).is_file()
