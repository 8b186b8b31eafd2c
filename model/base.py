"""The frozen models that training starts from: a Stable Diffusion 1.x or 2.x folder and a CLIP folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPVisionModelWithProjection

from model.errors import ModelError
from model.subject_net import SubjectNet
from subject_diffusion.loading_bars import no_loading_bars
from subject_diffusion.packaged import local_path

UNLOADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
"""What loading a folder of the wrong kind, or a file cut short, raises."""


@dataclass(frozen=True)
class Base:
    """The parts of a Stable Diffusion, frozen."""

    vae: AutoencoderKL
    text_encoder: Any
    tokenizer: Any
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin


@no_loading_bars()
def load_base(folder: str | Path) -> Base:
    """Loads a folder in diffusers' format, as float32. Raises ModelError if it holds another kind of model."""
    folder = local_path(folder)
    index = _json(folder / "model_index.json", f"base {folder}")
    expected = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for part, kind in expected.items():
        found = (index.get(part) or [None, None])[1]
        if found != kind.__name__ or not (folder / part).is_dir():
            raise ModelError(
                f"base {folder}: a Stable Diffusion 1.x or 2.x is needed, with {part} of class {kind.__name__}, "
                f"not {found or 'none'}"
            )
    if "text_encoder_2" in index:
        raise ModelError(f"base {folder}: a Stable Diffusion 1.x or 2.x is needed, not one of two text encoders")
    try:
        base = Base(
            vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", **_weights(folder / "vae")),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", **_weights(folder / "text_encoder")),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **_weights(folder / "unet")),
            scheduler=_scheduler(folder, index),
        )
    except UNLOADABLE as error:
        raise ModelError(f"base {folder}: {first_line(error)}") from None
    if base.unet.config.in_channels != base.vae.config.latent_channels:
        raise ModelError(
            f"base {folder}: its UNet takes {base.unet.config.in_channels} channels, not the "
            f"{base.vae.config.latent_channels} of plain latents; inpainting and depth models cannot be a base"
        )
    if base.unet.config.cross_attention_dim != base.text_encoder.config.hidden_size:
        raise ModelError(
            f"base {folder}: its UNet reads text {base.unet.config.cross_attention_dim} wide, its text encoder writes "
            f"{base.text_encoder.config.hidden_size}"
        )
    for part in (base.vae, base.text_encoder, base.unet):
        part.eval().requires_grad_(False)
    return base


@no_loading_bars()
def load_image_encoder(folder: str | Path) -> tuple[Any, Any]:
    """Loads a CLIP folder in transformers' format (CLIPModel) or its vision half (CLIPVisionModelWithProjection).

    Returns the vision model, frozen, as float32, and its image processor. Raises ModelError.
    """
    folder = local_path(folder)
    kind = _json(folder / "config.json", f"image encoder {folder}").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ModelError(f"image encoder {folder}: a CLIP model is needed, not {kind!r}")
    try:
        if kind == "clip":
            encoder = _vision_half(CLIPModel.from_pretrained(folder, **_weights(folder)))
        else:
            encoder = CLIPVisionModelWithProjection.from_pretrained(folder, **_weights(folder))
        processor = _processor(folder, encoder.config.image_size)
    except UNLOADABLE as error:
        raise ModelError(f"image encoder {folder}: {first_line(error)}") from None
    return encoder.eval().requires_grad_(False), processor


@no_loading_bars()
def load_subject_net(folder: str | Path) -> SubjectNet:
    """A folder of `SubjectNet.save_pretrained`. Raises ModelError when it is of another kind."""
    try:
        net: SubjectNet = SubjectNet.from_pretrained(folder)
    except UNLOADABLE as error:
        raise ModelError(
            f"subject net {folder}: not a folder of SubjectNet.save_pretrained ({first_line(error)})"
        ) from None
    return net


def _weights(folder: Path) -> dict[str, Any]:
    """How to load the weights in a folder: as float32, those of the only variant where there is no other."""
    variants = {name.split(".")[1] for path in folder.glob("*model*.safetensors") if "-of-" not in (name := path.name)}
    only = variants.pop() if len(variants) == 1 else "safetensors"
    return {"dtype": torch.float32} | ({} if only == "safetensors" else {"variant": only})


def _processor(folder: Path, side: int) -> Any:
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return CLIPImageProcessor.from_pretrained(folder)
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _vision_half(clip: Any) -> Any:
    # A whole CLIP states the width of its shared space at the top; its vision half may state another.
    config = clip.config.vision_config
    config.projection_dim = clip.config.projection_dim
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(config)
    encoder.vision_model, encoder.visual_projection = clip.vision_model, clip.visual_projection
    return encoder


def _scheduler(folder: Path, index: dict[str, Any]) -> SchedulerMixin:
    name = (index.get("scheduler") or [None, None])[1]
    kind = getattr(diffusers, str(name), None)
    if kind is None or not issubclass(kind, SchedulerMixin):
        raise ModelError(f"base {folder}: its scheduler is {name or 'missing'}, which diffusers does not have")
    scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    if "prediction_type" not in scheduler.config:
        raise ModelError(
            f"base {folder}: its scheduler is {name}, of flow matching; a Stable Diffusion 1.x or 2.x is needed, with "
            "one for noise or v, such as DDIMScheduler"
        )
    return scheduler


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{what}: no {path.name} in it; give a folder as save_pretrained writes it") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{what}: {path.name} cannot be read: {first_line(error)}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{what}: {path.name} holds no settings")
    return tree


def first_line(error: Exception) -> str:
    """The first line of a library's error message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
