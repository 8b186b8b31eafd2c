"""Training runs that take seconds: a tiny base of random weights, a dataset of smooth noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from train.trainer.checkpoint import checkpoints, load_checkpoint
from train.trainer.recipe import TrainRecipe


def recipe_tree(base: Path, clip: Path, dataset: Path, /, **changes: Any) -> dict[str, Any]:
    """changes: keys of the recipe; those of a block are added to it."""
    tree: dict[str, Any] = {
        "sources": [{"path": str(dataset)}],
        "window": 2,
        "base": str(base),
        "image_encoder": str(clip),
        "model": {"max_subjects": 2, "attention_downsampling": [1, 2]},
        "examples": {"size_px": 64},
        "optimizer": {"steps": 6, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2, "ema": 0.9, "min_snr": 5},
        "run": {"micro_batch": 2, "loader_workers": 0, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 9,
                "device": "cpu"},
        "validation": {"every": 1000, "images": 2, "num_inference_steps": 2},
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    return tree


def training_recipe(base: Path, clip: Path, dataset: Path, /, **changes: Any) -> TrainRecipe:
    return TrainRecipe.model_validate(recipe_tree(base, clip, dataset, **changes))


def write_training_recipe(path: Path, base: Path, clip: Path, dataset: Path, /, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(recipe_tree(base, clip, dataset, **changes)))
    return path


def learned(out: Path, checkpoint: int = -1) -> dict[str, Tensor]:
    """Everything in the newest checkpoint, or the one of that place, by file and name."""
    tensors, _ = load_checkpoint(checkpoints(out / "checkpoints")[checkpoint])
    return {f"{stem}/{name}": t for stem, named in tensors.items() for name, t in named.items()}


def logged(out: Path, name: str = "loss/total") -> dict[int, float]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def check_learnt_the_same(out: Path, undisturbed: Path) -> None:
    """But for rounding, which Adam makes large where a gradient is nearly zero, and more so with every step."""
    expected, found = learned(undisturbed, 0), learned(out, 0)
    assert expected.keys() == found.keys()
    for name in expected:

        def with_name(said: str, name: str = name) -> str:
            return f"{name}: {said}"

        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=5e-4, msg=with_name)
    losses, others = logged(out), logged(undisturbed)
    assert losses == pytest.approx({step: others[step] for step in losses}, rel=1e-3)
