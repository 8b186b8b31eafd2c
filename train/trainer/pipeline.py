"""What a run leaves: a diffusers pipeline with the averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from model import SubjectDiffusionPipeline, SubjectNet
from subject_diffusion.storage import whole_folder
from train.trainer.recipe import TrainRecipe
from train.trainer.run_folder import PIPELINE


def net_with(weights: Mapping[str, Tensor], like: SubjectNet) -> SubjectNet:
    """A net of the same settings as `like`, for sampling with these weights."""
    net: SubjectNet = SubjectNet.from_config(like.config)
    net.load_state_dict(weights, strict=False)
    net.eval().requires_grad_(False)
    return net


def write_pipeline(recipe: TrainRecipe, net: SubjectNet, out: Path) -> None:
    """Writes `save_pretrained`'s folder."""
    background = recipe.examples.reference.background
    pipeline = SubjectDiffusionPipeline.from_base(recipe.base, recipe.image_encoder, net, background)
    with whole_folder(out / PIPELINE) as partial:
        pipeline.save_pretrained(partial)
