"""A trained model as it lies in a folder: what can be known of it before its weights are loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from subject_diffusion.errors import RunError
from train.sampling.settings import SamplingSettings
from train.trainer.recipe import TrainRecipe
from train.trainer.run_folder import RECIPE, finished_pipeline

INDEX = "model_index.json"
_DECIDES = frozenset({".json", ".safetensors", ".txt"})
"""Endings of files that decide what a model draws. Its own code is never executed."""
_RESCALE = 0.7
"""Of guidance, for bases whose schedule ends in pure noise (Lin et al. 2024)."""


@dataclass(frozen=True)
class TrainedModel:
    """A pipeline's folder, and how it is sampled unless told otherwise."""

    pipeline: Path
    defaults: SamplingSettings
    device: str = "auto"

    def digest(self) -> str:
        """SHA-256 over the names and bytes of all files that decide what it draws."""
        whole = hashlib.sha256()
        for path in sorted(p for p in self.pipeline.rglob("*") if p.suffix in _DECIDES and p.is_file()):
            whole.update(path.relative_to(self.pipeline).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    @property
    def max_subjects(self) -> int:
        return int(self._config("subject_net")["settings"]["max_subjects"])

    @property
    def factor(self) -> int:
        """Of which the sides of a picture are multiples, in pixels."""
        return int(2 ** (len(self._config("vae")["block_out_channels"]) - 1))

    @property
    def side(self) -> int:
        """Height and width of a picture unless told otherwise, in pixels."""
        return int(self._config("unet")["sample_size"]) * self.factor

    def _config(self, part: str) -> dict[str, Any]:
        return _read_json(self.pipeline / part / "config.json")


def trained_model(folder: Path) -> TrainedModel:
    """The model in a folder of a run of `sdd train` that has ended, which is sampled as the run's validation grids are,
    or of a pipeline. Raises RunError."""
    if (folder / INDEX).exists():
        if "subject_net" not in _read_json(folder / INDEX):
            raise RunError(f"{folder}: a pipeline without subject_net; give one that `sdd train` wrote")
        ends_in_noise = _read_json(folder / "scheduler/scheduler_config.json").get("rescale_betas_zero_snr")
        return TrainedModel(folder, SamplingSettings(guidance_rescale=_RESCALE if ends_in_noise else 0.0))
    pipeline = finished_pipeline(folder)
    try:
        recipe = TrainRecipe.model_validate_json((folder / RECIPE).read_text())
    except (OSError, ValidationError) as error:
        said = str(error).splitlines()[0]
        raise RunError(f"{folder}: no training run of `sdd train` ({said})") from None
    return TrainedModel(pipeline, SamplingSettings(**recipe.validation.sampling()), recipe.run.device)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{path}: missing or damaged; train the model again, or copy its folder anew")
    return found
