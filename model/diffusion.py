"""Subject-Diffusion for training: the frozen base with a `SubjectNet`, from a batch to its losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from model.attention_control import attention_loss
from model.base import load_base, load_image_encoder
from model.errors import ModelError
from model.latents import posterior
from model.location import location_mask
from model.noise import Prediction, add_noise, signal_to_noise, target
from model.prompt import Prompts, PromptTokenizer
from model.reference import encode_references
from model.settings import SubjectSettings
from model.subject_net import SubjectNet
from model.unet import admit_subjects, enable_gradient_checkpointing, transformer_blocks


@dataclass(frozen=True)
class TrainingBatch:
    """One step's data and all of its randomness: the model draws nothing itself. K = max_subjects slots, of which
    subjects fill the first, in the order of the prompt's tags. Raises ModelError when shapes contradict each other."""

    latents: Tensor
    """(B, C, h, w) float, scaled as the UNet expects them: `SubjectDiffusion.encode_images`."""
    noise: Tensor
    """Like latents, ~ N(0, 1)."""
    timesteps: Tensor
    """(B,) int64, 0 .. num_train_timesteps − 1."""
    condition_draw: Tensor
    """(B,) float32, r ~ U(0, 1): what is dropped, see `dropped_conditions`. 1 drops nothing."""
    prompts: Prompts
    """`SubjectDiffusion.prompt_tokenizer(captions, tags)`."""
    classes: Tensor
    """(B, K, D): of `SubjectDiffusion.encode_references`; whatever where absent."""
    patches: Tensor
    """(B, K, P, W): likewise."""
    boxes: Tensor
    """(B, K, 4) float32, xyxy, 0..1 of the image; zeros where absent."""
    masks: Tensor
    """(B, K, h, w) float32, 0..1: each subject's share of each latent pixel; zeros where absent."""
    present: Tensor
    """(B, K) bool: which slots hold a subject."""
    time_ids: Tensor
    """(B, 6) float32, of `EncodedText.added`."""

    def __post_init__(self) -> None:
        (batch, _, *size), slots = self.latents.shape, self.prompts.placeholders.shape[1]
        expected = {
            "noise": self.latents.shape,
            "timesteps": (batch,),
            "condition_draw": (batch,),
            "classes": (batch, slots, *self.classes.shape[2:]),
            "patches": (batch, slots, *self.patches.shape[2:]),
            "boxes": (batch, slots, 4),
            "masks": (batch, slots, *size),
            "present": (batch, slots),
            "time_ids": (batch, 6),
        }
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != tuple(shape):
                raise ModelError(f"training batch: {name} is of shape {found}; {tuple(shape)} belongs to its latents")
        # On another device the look would wait for it; the batch was made on the CPU once.
        if self.boxes.device.type == "cpu" and not ((self.boxes >= 0) & (self.boxes <= 1)).all():
            raise ModelError("training batch: a box reaches out of its image; boxes are x1, y1, x2, y2 in 0..1")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainingBatch:
        def moved(value: Any) -> Any:
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return dataclasses.replace(
                    value, **{f.name: moved(getattr(value, f.name)) for f in dataclasses.fields(value)}
                )
            return value.to(device, non_blocking=non_blocking)

        batch: TrainingBatch = moved(self)
        return batch


@dataclass(frozen=True)
class Losses:
    """Each term for each image, unweighted, float32. The loss of a step is
    `(weight * diffusion).mean() + settings.attention_weight * attention.mean()`, with 1 or min-SNR for weight."""

    diffusion: Tensor
    """(B,) mean squared error of the UNet's prediction."""
    attention: Tensor
    """(B,); zeros where the text was dropped, where no subject is, and with attention_loss=none."""


def dropped_conditions(draw: Tensor, settings: SubjectSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Which conditions are dropped for each image of a batch: text, location, adapter tokens; (B,) bool each.

    draw: (B,) in [0, 1]. By default r < 0.05 trains the guidance's image branch (no text), 0.05 <= r < 0.10 its
    unconditional branch (nothing), 0.10 <= r < 0.15 text alone, the rest the full one.
    """

    def within(interval: tuple[float, float]) -> Tensor:
        return (draw >= interval[0]) & (draw < interval[1])

    text, location = within(settings.drop_text), within(settings.drop_location)
    return text, location, location if settings.drop_subject_tokens else torch.zeros_like(location)


class SubjectDiffusion(nn.Module):
    """`forward(batch) -> Losses`. Only `subject_net` is trained; the base's UNet and VAE, and CLIP, are frozen, and may
    be of a narrower dtype under autocast."""

    alphas_cumprod: Tensor
    empty_ids: Tensor
    clip_mean: Tensor
    clip_std: Tensor

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        image_encoder: Any,
        subject_net: SubjectNet,
        *,
        tokenizer: Any,
        scheduler: Any,
        image_processor: Any,
    ) -> None:
        """The parts as `from_base` or a SubjectDiffusionPipeline has them."""
        super().__init__()
        self.vae, self.unet, self.image_encoder, self.subject_net = vae, unet, image_encoder, subject_net
        admit_subjects(unet)
        for frozen in (vae, unet, image_encoder):
            frozen.eval().requires_grad_(False)
        self.tokenizer, self.scheduler, self.image_processor = tokenizer, scheduler, image_processor
        self.settings = s = SubjectSettings.model_validate(subject_net.config.settings)
        length = subject_net.text_encoder.config.max_position_embeddings
        self.prompt_tokenizer = PromptTokenizer(tokenizer, length, s.max_subjects)
        self.prediction_type: Prediction = scheduler.config.prediction_type
        if self.prediction_type not in get_args(Prediction):
            raise ModelError(
                f"base scheduler: prediction_type {self.prediction_type}; epsilon or v_prediction is needed"
            )
        if s.attention_loss != "none":
            _check_downsampling(unet, s)
        schedule = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
        self.register_buffer("alphas_cumprod", schedule.float(), persistent=False)
        self.register_buffer("empty_ids", self.prompt_tokenizer([""], [[]]).ids, persistent=False)
        self.register_buffer("clip_mean", torch.tensor(image_processor.image_mean), persistent=False)
        self.register_buffer("clip_std", torch.tensor(image_processor.image_std), persistent=False)

    @classmethod
    def from_base(
        cls,
        folder: str | Path,
        settings: SubjectSettings,
        image_encoder: str | Path,
        dtype: torch.dtype = torch.float32,
    ) -> SubjectDiffusion:
        """An untrained model: its adapters and its mask channel add zero, so that with no placeholder in the prompt it
        predicts exactly what its base predicts.

        folder: Stable Diffusion 1.x, 2.x or XL in diffusers' format; image_encoder: a CLIP folder; dtype: of the base's
        UNet and VAE and of CLIP, while `subject_net` is float32, as is XL's VAE where its `force_upcast` asks for that:
        with another one, `forward` is for autocast. Raises ModelError.
        """
        base, (clip, processor) = load_base(folder, None), load_image_encoder(image_encoder, None)
        net = base.untrained_net(clip, settings.model_dump(mode="json")).float()
        # The others' VAEs have the setting too, by diffusers' default.
        keeps_vae = base.text_encoder_2 is not None and base.vae.config.force_upcast
        for frozen, wanted in ((base.unet, dtype), (clip, dtype), (base.vae, torch.float32 if keeps_vae else dtype)):
            # Not the parts' own .to(), which warns of modules to keep in float32 though there are none.
            nn.Module.to(frozen, wanted)
        parts = {"tokenizer": base.tokenizer, "scheduler": base.scheduler, "image_processor": processor}
        return cls(base.vae, base.unet, clip, net, **parts)

    @property
    def reference_size(self) -> int:
        """Side of a reference in pixels: CLIP's input size."""
        return int(self.image_encoder.config.image_size)

    @property
    def latent_factor(self) -> int:
        """Image pixels per latent pixel, along each side; image sizes must be multiples of it."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of `subject_net`; everything else is frozen."""
        return [p for p in self.subject_net.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> SubjectDiffusion:
        """Puts only `subject_net` into training mode."""
        super().train(False)
        self.training = mode
        self.subject_net.train(mode)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes the activations of the UNet and the text encoders in the backward pass, to save memory."""
        enable_gradient_checkpointing(self.unet)
        for text_encoder in self.subject_net.text_encoders:
            text_encoder.activation_checkpointing_enable({"use_reentrant": False})

    def compile(self, *arguments: Any, **options: Any) -> None:
        """As of any module; the frozen encoders, which are called apart from `forward`, are compiled, too."""
        super().compile(*arguments, **options)
        for encoder in (self.vae.encoder, self.image_encoder):
            encoder.compile(*arguments, **options)

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images: (B, 3, H, W) uint8 RGB; noise: like the result, ~ N(0, 1), to sample the VAE's posterior with; None
        takes its mode. Returns latents (B, C, H / latent_factor, W / latent_factor), scaled."""
        return self.draw_latents(posterior(self.vae, images), noise)

    def draw_latents(self, posterior: Tensor, noise: Tensor | None = None) -> Tensor:
        """posterior: (B, 2, C, h, w), of `latents.posterior`; the rest as for `encode_images`."""
        mean, std = posterior.unbind(1)
        return (mean if noise is None else mean + std * noise) * float(self.vae.config.scaling_factor)

    @torch.no_grad()
    def encode_references(self, references: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """references: (B, K, 3, S, S) uint8 RGB at CLIP's input size (`reference_size`), whatever where absent;
        present: (B, K) bool. Returns the `classes` and the `patches` of a TrainingBatch."""
        return encode_references(self.image_encoder, references, present, self.clip_mean, self.clip_std)

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """SNR at each of timesteps (B,), for min-SNR weighting."""
        return signal_to_noise(self.alphas_cumprod[timesteps])

    def forward(self, batch: TrainingBatch) -> Losses:
        s, net = self.settings, self.subject_net
        no_text, no_location, no_tokens = dropped_conditions(batch.condition_draw, s)
        ids = torch.where(no_text.unsqueeze(-1), self.empty_ids, batch.prompts.ids)
        placeholders = batch.prompts.placeholders.masked_fill(no_text.unsqueeze(-1), -1)
        text = net.encode_prompt(ids, placeholders, batch.classes)
        height, width = batch.latents.shape[-2:]
        seen = batch.present & ~no_tokens.unsqueeze(-1)
        tokens = net.encode_subjects(batch.patches, batch.boxes, seen)
        cells = net.cells_reached(batch.boxes, seen, (height, width))
        location = location_mask(batch.boxes, batch.present, height, width)
        location = location.masked_fill(no_location[:, None, None, None], 0)

        alphas = self.alphas_cumprod[batch.timesteps]
        noisy = add_noise(batch.latents, batch.noise, alphas)
        watched = None if s.attention_loss == "none" else batch.prompts.watched(s.attention_tokens)
        prediction, maps = net.denoise(
            self.unet, noisy, batch.timesteps, text, tokens, location, watched, batch.time_ids, cells
        )

        wanted = target(batch.latents, batch.noise, alphas, self.prediction_type)
        squared = functional.mse_loss(prediction.float(), wanted.float(), reduction="none")
        diffusion = squared.mean(dim=(1, 2, 3))
        attention = torch.zeros_like(diffusion)
        if s.attention_loss != "none":
            # One weighting of tokens a subject, or two: its placeholder, then its tag.
            times = 2 if s.attention_tokens == "both" else 1
            counts = (batch.present & ~no_text.unsqueeze(-1)).repeat(1, times)
            attention = attention_loss(maps, batch.masks.repeat(1, times, 1, 1), counts, s.attention_loss)
        return Losses(diffusion, attention)


def _check_downsampling(unet: UNet2DConditionModel, settings: SubjectSettings) -> None:
    has = {block.downsampling for block in transformer_blocks(unet)}
    if not has & set(settings.attention_downsampling):
        raise ModelError(
            f"attention_downsampling={list(settings.attention_downsampling)}: the base's UNet has attention at "
            f"{sorted(has)} only; name some of these, or set attention_loss=none"
        )
