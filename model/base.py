"""The frozen models that training starts from: a Stable Diffusion 1.x, 2.x or XL folder and a CLIP folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from model.errors import ModelError
from model.prompt import SecondTokens
from model.subject_net import SubjectNet
from subject_diffusion.loading_bars import no_loading_bars
from subject_diffusion.packaged import local_path

UNLOADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
"""What loading a folder of the wrong kind, or a file cut short, raises."""
_TIME_IDS = 6
"""Numbers of `EncodedText.added`."""


@dataclass(frozen=True)
class Base:
    """The parts of a Stable Diffusion, frozen. Those of XL alone are None elsewhere."""

    vae: AutoencoderKL
    text_encoder: Any
    tokenizer: Any
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    force_zeros_for_empty_prompt: bool | None = None

    def untrained_net(self, image_encoder: Any, settings: dict[str, Any]) -> SubjectNet:
        """`SubjectNet.from_base`, with its arguments."""
        second = None
        if self.text_encoder_2 is not None:
            end, pad = self.tokenizer.eos_token_id, self.tokenizer_2.pad_token_id
            second = SecondTokens(end, pad, bool(self.force_zeros_for_empty_prompt))
        encoders = {"text_encoder_2": self.text_encoder_2, "second_tokens": second}
        net: SubjectNet = SubjectNet.from_base(self.unet, self.text_encoder, image_encoder, settings, **encoders)
        return net


@no_loading_bars()
def load_base(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> Base:
    """Loads a folder in diffusers' format. dtype: None keeps that of the files, whose pages a node's processes then
    share. Raises ModelError if it holds another kind of model."""
    folder = local_path(folder)
    index = _json(folder / "model_index.json", f"base {folder}")
    is_xl = _is_xl(folder, index)
    try:
        base = Base(
            vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", **_weights(folder / "vae", dtype)),
            text_encoder=CLIPTextModel.from_pretrained(
                folder / "text_encoder", **_weights(folder / "text_encoder", dtype)
            ),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **_weights(folder / "unet", dtype)),
            scheduler=_scheduler(folder, index),
            **(_xl_parts(folder, index, dtype) if is_xl else {}),
        )
    except UNLOADABLE as error:
        raise ModelError(f"base {folder}: {first_line(error)}") from None
    _check_widths(base, folder)
    for part in (base.vae, base.text_encoder, base.unet, base.text_encoder_2):
        if part is not None:
            part.eval().requires_grad_(False)
    return base


def _is_xl(folder: Path, index: dict[str, Any]) -> bool:
    """Whether the folder holds a Stable Diffusion XL rather than 1.x or 2.x; by its configurations, before any weights
    are loaded. Raises ModelError where it is none of them."""
    classes = {part: found[1] for part, found in index.items() if isinstance(found, list) and len(found) == 2}
    expected = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    added = None
    if classes.get("unet") == UNet2DConditionModel.__name__:
        added = _json(folder / "unet" / "config.json", f"base {folder}").get("addition_embed_type")
    if is_xl := added == "text_time" or classes.get("text_encoder_2") is not None:
        expected["text_encoder_2"] = CLIPTextModelWithProjection
    for part, kind in expected.items():
        found = classes.get(part)
        if found != kind.__name__ or not (folder / part).is_dir():
            a_base = "a Stable Diffusion XL, not its refiner," if is_xl else "a Stable Diffusion 1.x, 2.x or XL"
            raise ModelError(
                f"base {folder}: {a_base} is needed, with {part} of class {kind.__name__}, not {found or 'none'}"
            )
    if added != ("text_time" if is_xl else None):
        raise ModelError(
            f"base {folder}: its UNet's addition_embed_type is {added}; a Stable Diffusion 1.x or 2.x has none, and XL "
            "text_time"
        )
    return is_xl


def _xl_parts(folder: Path, index: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    second = folder / "text_encoder_2"
    return {
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(second, **_weights(second, dtype)),
        "tokenizer_2": AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
    }


def _check_widths(base: Base, folder: Path) -> None:
    if base.unet.config.in_channels != base.vae.config.latent_channels:
        raise ModelError(
            f"base {folder}: its UNet takes {base.unet.config.in_channels} channels, not the "
            f"{base.vae.config.latent_channels} of plain latents; inpainting and depth models cannot be a base"
        )
    written = base.text_encoder.config.hidden_size
    if base.text_encoder_2 is not None:
        written += base.text_encoder_2.config.hidden_size
        _check_xl(base, folder)
    if base.unet.config.cross_attention_dim != written:
        raise ModelError(
            f"base {folder}: its UNet reads text {base.unet.config.cross_attention_dim} wide, its text encoder writes "
            f"{written}"
        )


def _check_xl(base: Base, folder: Path) -> None:
    if base.tokenizer.get_vocab() != base.tokenizer_2.get_vocab():
        raise ModelError(
            f"base {folder}: its two tokenizers have different vocabularies, and Stable Diffusion XL's one"
        )
    if base.vae.config.latents_mean is not None:
        raise ModelError(f"base {folder}: its latents have a mean and deviation of their own, which is not supported")
    width, unet = base.text_encoder_2.config.projection_dim, base.unet.config
    if unet.projection_class_embeddings_input_dim != width + _TIME_IDS * unet.addition_time_embed_dim:
        raise ModelError(
            f"base {folder}: its UNet takes other conditions than the pooled text, {width} wide, and {_TIME_IDS} "
            "numbers of size and crop; a Stable Diffusion XL base is needed, not its refiner"
        )


@no_loading_bars()
def load_vae(folder: str | Path) -> AutoencoderKL:
    """The VAE of a folder that `load_base` takes, frozen, as float32. Raises ModelError."""
    folder = local_path(folder)
    weights = _weights(folder / "vae", torch.float32)
    try:
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder, subfolder="vae", **weights)
    except UNLOADABLE as error:
        raise ModelError(f"base {folder}: {first_line(error)}") from None
    return vae.eval().requires_grad_(False)


@no_loading_bars()
def load_image_encoder(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> tuple[Any, Any]:
    """Loads a CLIP folder in transformers' format (CLIPModel) or its vision half (CLIPVisionModelWithProjection).

    dtype: as for `load_base`. Returns the vision model, frozen, and its image processor. Raises ModelError.
    """
    folder = local_path(folder)
    kind = _json(folder / "config.json", f"image encoder {folder}").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ModelError(f"image encoder {folder}: a CLIP model is needed, not {kind!r}")
    try:
        if kind == "clip":
            encoder = _vision_half(CLIPModel.from_pretrained(folder, **_weights(folder, dtype)))
        else:
            encoder = CLIPVisionModelWithProjection.from_pretrained(folder, **_weights(folder, dtype))
        processor = _processor(folder, encoder.config.image_size)
    except UNLOADABLE as error:
        raise ModelError(f"image encoder {folder}: {first_line(error)}") from None
    return encoder.eval().requires_grad_(False), processor


@no_loading_bars()
def load_subject_net(folder: str | Path) -> SubjectNet:
    """A folder of `SubjectNet.save_pretrained`. Raises ModelError when it is of another kind."""
    try:
        net: SubjectNet = SubjectNet.from_pretrained(local_path(folder))
    except UNLOADABLE as error:
        raise ModelError(
            f"subject net {folder}: not a folder of SubjectNet.save_pretrained ({first_line(error)})"
        ) from None
    return net


def _weights(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """How to load the weights in a folder: those of the only variant where there is no other."""
    files = list(folder.glob("*model*.safetensors"))
    variants = {path.name.split(".")[1] for path in files if "-of-" not in path.name}
    only = variants.pop() if len(variants) == 1 else "safetensors"
    return {"dtype": dtype or _stored_dtype(files)} | ({} if only == "safetensors" else {"variant": only})


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """The narrow type that all numbers in these files have, else float32."""
    found = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    floats = {name for name in found if name.startswith(("F", "BF"))}
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get("/".join(floats), torch.float32)


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
            f"base {folder}: its scheduler is {name}, of flow matching; a Stable Diffusion 1.x, 2.x or XL is needed, "
            "with one for noise or v, such as DDIMScheduler"
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
