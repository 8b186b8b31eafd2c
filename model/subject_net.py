"""The trainable subset: everything that Subject-Diffusion trains, in one module; the base stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from model.adapter import SubjectTokens, TokenRun
from model.attention_control import AttentionMap
from model.base_layers import base_layers, sampled_weights
from model.errors import ModelError
from model.location import LocationConv, cells_reached
from model.prompt import EncodedText, ImageToWord, SecondTokens, encode_prompt, encode_prompt_twice
from model.unet import BlockKeys, SubjectBlock, Subjects, admit_subjects, transformer_blocks

READ_SETTINGS = {
    "max_subjects", "image_cls", "adapter", "adapter_reach", "box_embedding", "location_mask", "attention_downsampling"
}  # fmt: skip
"""Those of `SubjectSettings` that a trained net is called with."""


class SubjectNet(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]  # diffusers is untyped
    """What is trained [paper]: the text encoder, the cross-attentions' keys and values, the adapters, the UNet's first
    convolution, and the two MLPs: 582 M parameters on Stable Diffusion 2. On Stable Diffusion XL, both text encoders,
    each with an MLP of its own from reference to word, as the placeholder is a word to both.

    `save_pretrained` writes these alone, as safetensors; `from_pretrained` reads them again. The base's own weights are
    untouched beside them, so that a model with subjects and the base can be had from the same UNet, step by step.
    Where they take the place of the base's, they are whole, and belong to that base; `base_weights` tells which it was.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # as above
    def __init__(
        self,
        settings: dict[str, Any],
        text_config: dict[str, Any],
        block_configs: list[dict[str, int]],
        latent_channels: int,
        stem_channels: int,
        image_width: int,
        patch_width: int,
        base_weights: dict[str, float] | None = None,
        second_text_config: dict[str, Any] | None = None,
        second_tokens: dict[str, Any] | None = None,
    ) -> None:
        """settings: of SubjectSettings, all of them; text_config: of CLIPTextConfig; block_configs: of `block_configs`;
        image_width, patch_width: of CLIP's class embedding and patches; base_weights: `sampled_weights` of the base's
        layers; second_text_config, second_tokens: of CLIPTextConfig and SecondTokens, on Stable Diffusion XL."""
        super().__init__()
        if missing := sorted(READ_SETTINGS - settings.keys()):
            raise ModelError(f"subject net: its config.json lacks {', '.join(missing)}: an earlier release wrote it")
        self.max_subjects: int = settings["max_subjects"]
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))
        self.image_to_word = ImageToWord(image_width, self.text_encoder.config.hidden_size, settings["image_cls"])
        self.second_tokens = None if second_tokens is None else SecondTokens(**second_tokens)
        self.text_encoder_2: CLIPTextModelWithProjection | None = None
        self.image_to_word_2: ImageToWord | None = None
        if second_text_config is not None:
            self.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**second_text_config))
            width = self.text_encoder_2.config.hidden_size
            self.image_to_word_2 = ImageToWord(image_width, width, settings["image_cls"])
        self.text_width: int = sum(encoder.config.hidden_size for encoder in self.text_encoders)
        self.subject_tokens = (
            SubjectTokens(patch_width, self.text_width, self.max_subjects, settings["box_embedding"])
            if settings["adapter"]
            else None
        )
        self.conv_in = LocationConv(latent_channels + 1, stem_channels, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(SubjectBlock(**{"adapter": settings["adapter"]} | block) for block in block_configs)

    @classmethod
    def from_base(
        cls,
        unet: UNet2DConditionModel,
        text_encoder: Any,
        image_encoder: Any,
        settings: dict[str, Any],
        text_encoder_2: Any = None,
        second_tokens: SecondTokens | None = None,
    ) -> SubjectNet:
        """An untrained net, which changes nothing: copies of the base's weights, and adapters and a mask channel that
        add zero.

        unet: is made to take subjects, in place; text_encoder: CLIPTextModel; image_encoder:
        CLIPVisionModelWithProjection; settings: of SubjectSettings, all of them, as in JSON; text_encoder_2:
        CLIPTextModelWithProjection, of Stable Diffusion XL, with its second_tokens.
        """
        admit_subjects(unet)
        net: SubjectNet = cls(
            settings=settings,
            text_config=text_encoder.config.to_diff_dict(),
            block_configs=block_configs(unet),
            latent_channels=unet.conv_in.in_channels,
            stem_channels=unet.conv_in.out_channels,
            image_width=image_encoder.config.projection_dim,
            patch_width=image_encoder.config.hidden_size,
            base_weights=sampled_weights(base_layers(unet, text_encoder, text_encoder_2)),
            second_text_config=None if text_encoder_2 is None else text_encoder_2.config.to_diff_dict(),
            second_tokens=None if second_tokens is None else asdict(second_tokens),
        )
        net.text_encoder = copy.deepcopy(text_encoder).requires_grad_(True)
        if text_encoder_2 is not None:
            net.text_encoder_2 = copy.deepcopy(text_encoder_2).requires_grad_(True)
        net.conv_in = LocationConv.like(unet.conv_in)
        block: Any
        for block, base in zip(net.blocks, transformer_blocks(unet), strict=True):
            block.to_k.load_state_dict(base.attn2.to_k.state_dict())
            block.to_v.load_state_dict(base.attn2.to_v.state_dict())
            if block.adapter is not None and settings["adapter_start"] == "open":
                block.adapter.open_gates()
        net.freeze_unread()
        return net

    @property
    def text_encoders(self) -> list[Any]:
        """One, or two."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def text_layers(self) -> list[Any]:
        """Those of all text encoders."""
        second = [] if self.text_encoder_2 is None else self.text_encoder_2.text_model.encoder.layers
        return [*self.text_encoder.encoder.layers, *second]

    def freeze_unread(self) -> None:
        """What Stable Diffusion XL does not read of its first text encoder, and no gradient reaches."""
        if self.text_encoder_2 is not None:
            for unread in (self.text_encoder.encoder.layers[-1], self.text_encoder.final_layer_norm):
                unread.requires_grad_(False)

    def check_fits(self, unet: UNet2DConditionModel, image_encoder: Any) -> None:
        """Raises ModelError when the net was trained on a base or a CLIP of other dimensions."""
        admit_subjects(unet)
        c, clip = self.config, image_encoder.config
        if c.block_configs != block_configs(unet) or c.latent_channels != unet.conv_in.in_channels:
            raise ModelError("subject net: it was trained on another base: widths of the UNet differ")
        if (c.image_width, c.patch_width) != (clip.projection_dim, clip.hidden_size):
            raise ModelError(
                f"subject net: it was trained on another image encoder, {c.image_width} and {c.patch_width} wide; this "
                f"one is {clip.projection_dim} and {clip.hidden_size}"
            )

    @apply_forward_hook  # type: ignore[untyped-decorator]  # diffusers is untyped
    def encode_prompt(self, ids: Tensor, placeholders: Tensor, image_embeds: Tensor, clip_skip: int = 0) -> EncodedText:
        """ids: (B, T) int64; placeholders: (B, K) int64, -1 for none; image_embeds: (B, k, image_width), k <= K: CLIP's
        class embeddings of the subjects in the first slots; clip_skip: how many of the last layers are left out."""
        words, places = self.image_to_word(image_embeds), placeholders[:, : image_embeds.shape[1]]
        if self.text_encoder_2 is None or self.image_to_word_2 is None or self.second_tokens is None:
            return EncodedText(encode_prompt(self.text_encoder, ids, places, words, clip_skip))
        encoders, both = (self.text_encoder, self.text_encoder_2), (words, self.image_to_word_2(image_embeds))
        return encode_prompt_twice(encoders, ids, places, both, self.second_tokens, clip_skip)

    @apply_forward_hook  # type: ignore[untyped-decorator]  # as above
    def encode_subjects(self, patches: Tensor, boxes: Tensor, present: Tensor) -> Tensor | None:
        """patches: (B, k, P, patch_width); boxes: (B, k, 4) xyxy, 0..1; present: (B, k) bool; k <= max_subjects.
        Returns the adapters' tokens (B, max_subjects · P, D); None without adapters."""
        return None if self.subject_tokens is None else self.subject_tokens(patches, boxes, present)

    def cells_reached(self, boxes: Tensor, present: Tensor, size: tuple[int, int]) -> Tensor | None:
        """Which latent pixels may attend to each subject, of `location.cells_reached`; None: all. size: (h, w) of the
        latents."""
        if self.subject_tokens is None or self.config.settings["adapter_reach"] == "image":
            return None
        return cells_reached(boxes, present, *size)

    def denoise(
        self,
        unet: UNet2DConditionModel,
        latents: Tensor,
        timesteps: Tensor,
        text: EncodedText,
        tokens: Tensor | None,
        location: Tensor | None,
        watched: Tensor | None = None,
        time_ids: Tensor | None = None,
        cells: Tensor | None = None,
    ) -> tuple[Tensor, list[AttentionMap]]:
        """One call of the UNet with subjects.

        latents: (B, C, h, w); timesteps: (B,) or scalar; text: of `encode_prompt`; tokens: of `encode_subjects`;
        location: (B, 1, h, w), 1 on the background; watched: (B, T, W), weightings of prompt tokens to record the
        attention of; time_ids: of `EncodedText.added`, for Stable Diffusion XL; cells: of `cells_reached`. Returns the
        UNet's prediction (B, C, h, w), and the maps of the layers that `attention_downsampling` names (none unless
        watched).
        """
        runs = [] if tokens is None else [TokenRun(tokens, per_subject=tokens.shape[1] // self.max_subjects)]
        named = frozenset(self.config.settings["attention_downsampling"])
        subjects = Subjects(self.blocks, runs, cells=cells, watched=watched, watched_at=named)
        added = None if time_ids is None else text.added(time_ids)
        return self._call(unet, latents, timesteps, text.states, location, subjects, added=added), subjects.maps

    @apply_forward_hook  # type: ignore[untyped-decorator]  # as above
    def keys(self, text: Tensor, tokens: Sequence[TokenRun]) -> list[BlockKeys]:
        """What each transformer block reads of the prompt and the subjects at every step: to be computed once.
        text: (B, T, D) of `encode_prompt`; tokens: `pack_tokens` of `encode_subjects`; none without adapters."""
        blocks: Any = self.blocks
        return [block.keys(text, tokens) for block in blocks]

    def denoise_step(
        self,
        unet: UNet2DConditionModel,
        latents: Tensor,
        timesteps: Tensor,
        keys: Sequence[BlockKeys],
        location: Tensor,
        cells: Tensor | None = None,
        scale: float = 1.0,
        attention: Mapping[str, Any] | None = None,
        added: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """`denoise` in sampling. keys: of `keys`; cells: of `cells_reached`; scale: β of the adapters, 0 leaves them
        out; attention: what else the UNet's `cross_attention_kwargs` hold; added: of `EncodedText.added`."""
        subjects = Subjects(self.blocks, keys=keys, scale=scale, cells=cells)
        prediction: Tensor = self._call(unet, latents, timesteps, None, location, subjects, attention, added)
        return prediction

    def enable_group_offload(self, onload_device: torch.device, *offload: Any, **options: Any) -> None:
        """By leaves, at whatever level: blocks come when their `forward` is called, and these are called in parts."""
        super().enable_group_offload(onload_device, *offload, **options | {"offload_type": "leaf_level"})

    @apply_forward_hook  # type: ignore[untyped-decorator]  # as above
    def _call(
        self,
        unet: UNet2DConditionModel,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | None,
        location: Tensor | None,
        subjects: Subjects,
        attention: Mapping[str, Any] | None = None,
        added: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        features = self.conv_in(latents, location if self.config.settings["location_mask"] else None)
        prediction: Tensor = unet(
            features,
            timesteps,
            encoder_hidden_states=text,
            cross_attention_kwargs={**(attention or {}), "subjects": subjects},
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction


def block_configs(unet: UNet2DConditionModel) -> list[dict[str, int]]:
    """The arguments of each transformer block's `SubjectBlock`, but for its ablation. unet: one that takes subjects.

    Where blocks follow one another at the same place, up to ten in Stable Diffusion XL, the first alone has an adapter:
    as many as there are places, 11, and as large as on Stable Diffusion 2, 212 M parameters, rather than 1.8 billion.
    """
    return [
        {
            "width": block.attn2.to_q.in_features,
            "text_width": block.attn2.to_k.in_features,
            "heads": block.attn2.heads,
            "head_width": block.attn2.to_q.out_features // block.attn2.heads,
            **({} if block.place == 0 else {"adapter": False}),
        }
        for block in transformer_blocks(unet)
    ]
