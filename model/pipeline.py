"""The pipeline as this project makes, saves and loads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

import model.sampling
from model.base import UNLOADABLE, first_line, load_base, load_image_encoder, load_subject_net
from model.base_layers import base_layers, move, of_another_base, sampled_weights
from model.diffusion import SubjectDiffusion
from model.errors import ModelError
from model.reference_background import ReferenceBackground
from model.sampling import CODE, NET_CODE
from model.single_file import NET_MODULES, PIPELINE_MODULES, single_file
from model.subject_net import SubjectNet
from subject_diffusion.loading_bars import no_loading_bars


class SubjectDiffusionPipeline(model.sampling.SubjectDiffusionPipeline):
    """Made of a base and a subject net, and loaded with this project's own code: that of a folder is not executed."""

    @classmethod
    @no_loading_bars()
    def from_pretrained(cls, folder: str | Path, **options: Any) -> SubjectDiffusionPipeline:
        """A folder of `save_pretrained`, or one on the hub; options: those of diffusers. Raises ModelError."""
        try:
            pipeline: SubjectDiffusionPipeline = super().from_pretrained(str(folder), **options)
        except UNLOADABLE as error:
            where = "" if Path(folder).is_dir() else "no such folder, and on the hub: "
            raise ModelError(f"pipeline {folder}: {where}{first_line(error)}") from None
        return pipeline

    @classmethod
    def _dict_from_json_file(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        # diffusers reads every configuration by this, and executes a folder's code where its class is a list.
        config: dict[str, Any] = super()._dict_from_json_file(*arguments, **options)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        return config

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        config = super().load_config(*arguments, **options)
        if "subject_net" in config:
            config["subject_net"] = [SubjectNet.__module__, SubjectNet.__name__]
        return config

    @classmethod
    def from_base(
        cls,
        folder: str | Path,
        image_encoder: str | Path,
        subject_net: str | Path | SubjectNet,
        reference_background: ReferenceBackground = "white",
    ) -> SubjectDiffusionPipeline:
        """A base, a CLIP, and what was trained on top of them (a folder of `SubjectNet.save_pretrained`, or the net).
        Raises ModelError."""
        base, (clip, processor) = load_base(folder), load_image_encoder(image_encoder)
        net = subject_net if isinstance(subject_net, SubjectNet) else load_subject_net(subject_net)
        net.check_fits(base.unet, clip)
        if of_another_base(
            base_layers(base.unet, base.text_encoder, base.text_encoder_2), net.config.base_weights or {}
        ):
            raise ModelError(
                f"base {folder}: the subject net was trained on another one; load the pipeline that was saved with it, "
                "and call its with_base"
            )
        return cls(**vars(base), image_encoder=clip, feature_extractor=processor, subject_net=net,
                   reference_background=reference_background)  # fmt: skip

    def with_base(self, folder: str | Path) -> SubjectDiffusionPipeline:
        """The same subjects on another base of the same dimensions, such as a community checkpoint: what was learned on
        this pipeline's base is added to that one's weights. folder: as for `from_base`. Raises ModelError."""
        if not self._has_base_encoders:
            raise ModelError("with_base needs all text encoders of the base that subject_net was trained on")
        base, net = load_base(folder), copy.deepcopy(self.subject_net)
        net.check_fits(base.unet, self.image_encoder)
        layers = base_layers(base.unet, base.text_encoder, base.text_encoder_2)
        move(net, base_layers(self.unet, self.text_encoder, self.text_encoder_2), layers)
        net.register_to_config(base_weights=sampled_weights(layers))
        # What an empty prompt is was learned with the old base.
        parts = vars(base) | {"force_zeros_for_empty_prompt": self.config.force_zeros_for_empty_prompt}
        return type(self)(**parts, image_encoder=self.image_encoder, feature_extractor=self.feature_extractor,
                          subject_net=net, reference_background=self.config.reference_background)  # fmt: skip

    def base(self) -> Any:
        """The base alone, as diffusers' own pipeline of these parts. Raises ModelError."""
        if not self._has_base_encoders:
            raise ModelError("the base alone needs all of its text encoders; load the whole folder")
        if self.subject_net.second_tokens is None:
            return StableDiffusionPipeline.from_pipe(self, safety_checker=None, requires_safety_checker=False)
        return StableDiffusionXLPipeline.from_pipe(self, add_watermarker=False)

    @classmethod
    def from_model(
        cls,
        model: SubjectDiffusion,
        subject_net: SubjectNet | None = None,
        reference_background: ReferenceBackground = "white",
    ) -> SubjectDiffusionPipeline:
        """A model in training, sharing its weights; subject_net: another one in its place, such as its moving average.
        It has no text encoder of the base, so `alpha` stays 0. With frozen parts in a narrower dtype, it is called
        under autocast, as the model is."""
        return cls(
            model.vae,
            None,
            model.tokenizer,
            model.unet,
            model.scheduler,
            model.image_encoder,
            model.image_processor,
            subject_net or model.subject_net,
            reference_background,
        )

    def _code(self) -> dict[str, str]:
        return {CODE: single_file(PIPELINE_MODULES), NET_CODE: single_file(NET_MODULES)}
