"""A trained model as it lies in a folder: what can be known of it before its weights are loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from subject_diffusion.errors import RunError
from subject_diffusion.packaged import local_path
from train.sampling.settings import SamplingSettings
from train.trainer.model_folder import model_folder
from train.trainer.recipe import TrainRecipe
from train.trainer.run_folder import (
    CHECKPOINT_RECORD,
    NET,
    OWN_RUN,
    PIPELINE,
    RECIPE,
    is_checkpoint,
    is_net,
    trained_model,
)

INDEX = "model_index.json"
SHIPPED = "toyworld/weights/subject-diffusion"
"""The bundled toy model."""
_DECIDES = frozenset({".json", ".safetensors", ".txt"})
"""Endings of files that decide what a model draws. Its own code is never executed."""
_RESCALE = 0.7
"""The share by which guidance is rescaled, for bases whose schedule ends in pure noise (Lin et al. 2024)."""


@dataclass(frozen=True)
class TrainedModel:
    """Where a model lies, and how it is sampled unless told otherwise."""

    folder: Path
    """As `open_pipeline` takes it, on this machine."""
    parts: tuple[Path, ...]
    """Folders whose files decide what it draws."""
    base: Path
    """Folder with its `vae` and `unet`."""
    max_subjects: int
    defaults: SamplingSettings
    device: str = "auto"

    def digest(self) -> str:
        """SHA-256 over the names and bytes of all files that decide what it draws."""
        whole = hashlib.sha256()
        for part in self.parts:
            for path in sorted(p for p in part.rglob("*") if p.suffix in _DECIDES and p.is_file()):
                whole.update(path.relative_to(part).as_posix().encode() + b"\0")
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    @property
    def factor(self) -> int:
        """The sides of a picture are multiples of this, in pixels."""
        return int(2 ** (len(_config(self.base / "vae")["block_out_channels"]) - 1))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a picture unless told otherwise, in pixels."""
        own = _config(self.base / "unet")["sample_size"]
        height, width = (own, own) if isinstance(own, int) else own
        return height * self.factor, width * self.factor


def default_model() -> Path:
    """What `make train` made here, once it has ended; until then the bundled toy model."""
    return OWN_RUN if (OWN_RUN / PIPELINE / INDEX).is_file() else local_path(SHIPPED)


def bundled_steps() -> int:
    """Training steps that the bundled toy model has learned for, in all its stages."""
    return int(_read_json(local_path(SHIPPED) / "scores.json")["steps"])


def find_model(path: Path) -> TrainedModel:
    """What `run_folder.trained_model` finds, which is sampled as its run's validation grids are. Raises SddError."""
    found = trained_model(path)
    if is_checkpoint(found) or is_net(found):
        said = found / (RECIPE if is_net(found) else CHECKPOINT_RECORD)
        recipe = _recipe(said, _read_json(said) if is_net(found) else _read_json(said).get("recipe"))
        base, clip = model_folder("base", recipe.base), model_folder("image_encoder", recipe.image_encoder)
        own = found / NET if is_net(found) else found
        return TrainedModel(
            found, (own, base, clip), base, recipe.model.max_subjects, _defaults(recipe), recipe.run.device
        )
    pipeline = found if found.is_dir() else model_folder("--run", str(found))
    if NET not in _read_json(pipeline / INDEX):
        raise RunError(f"{path}: a pipeline without subject_net; give one that `sdd train` wrote")
    most = int(_config(pipeline / NET)["settings"]["max_subjects"])
    written = next((folder / RECIPE for folder in (pipeline, path) if (folder / RECIPE).is_file()), None)
    if written is None:
        ends_in_noise = _read_json(pipeline / "scheduler/scheduler_config.json").get("rescale_betas_zero_snr")
        defaults = SamplingSettings(guidance_rescale=_RESCALE if ends_in_noise else 0.0)
        return TrainedModel(pipeline, (pipeline,), pipeline, most, defaults)
    recipe = _recipe(written, _read_json(written))
    return TrainedModel(pipeline, (pipeline,), pipeline, most, _defaults(recipe), recipe.run.device)


def _defaults(recipe: TrainRecipe) -> SamplingSettings:
    return SamplingSettings(**recipe.validation.sampling())


def _recipe(path: Path, tree: Any) -> TrainRecipe:
    try:
        return TrainRecipe.model_validate(tree)
    except ValidationError as error:
        said = str(error).splitlines()[0]
        raise RunError(f"{path}: no recipe of `sdd train` ({said})") from None


def _config(part: Path) -> dict[str, Any]:
    return _read_json(part / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{path}: missing or damaged; train the model again, or copy its folder anew")
    return found
