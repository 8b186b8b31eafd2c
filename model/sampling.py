"""Sampling: a diffusers pipeline that draws the subjects of reference images. A saved pipeline carries this code, so it
and what it imports of this project need torch, diffusers and transformers alone."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
)

from model.base_layers import base_layers, copy_lora, lora_scaled, of_another_base
from model.conditions import SeenSubjects, condition
from model.errors import ModelError
from model.guidance import hold_contrast
from model.inputs import Texts, check_counts, check_names, check_shares, given_texts, one_each, one_list_each
from model.interpolation import Interpolation, base_share
from model.latents import decode, initial_noise, last_steps, noised
from model.prediction import Prediction, base_prediction, blended, subject_prediction
from model.prompt import EncodedText, PromptTokenizer, encode_for_base
from model.reference import encode_references
from model.subject import Subject, stack_subjects
from model.unet import admit_subjects

CODE = "pipeline.py"
"""Where diffusers looks for a pipeline's own code in its folder, as `model_index.json` says."""
NET_CODE = "subject_net/subject_net.py"
"""Likewise for a component's."""


class SubjectDiffusionPipeline(
    DiffusionPipeline,  # type: ignore[misc]  # diffusers is untyped
    StableDiffusionMixin,  # type: ignore[misc]  # as above
    StableDiffusionLoraLoaderMixin,  # type: ignore[misc]  # as above
    TextualInversionLoaderMixin,  # type: ignore[misc]  # as above
):
    """Draws a prompt with the subjects of reference images, in one pass of sampling, with no tuning.

        pipe = SubjectDiffusionPipeline.from_pretrained(folder)
        pipe("a mug on a beach", subjects=[Subject(photo, "mug", mask=mask)]).images[0]

    A folder of `save_pretrained` holds the base's parts untouched, the image encoder, and `subject_net`, what was
    trained. `pipe.subject_net.save_pretrained(folder)` writes only the latter, to be put on
    its base again by `from_base`.
    """

    make_subject = staticmethod(Subject)
    """`pipe.make_subject(image, tag)`: where diffusers alone is installed, there is nothing to import it from."""
    # `subject_net` is not in the sequence: it works beside the UNet, and stays until the image is drawn.
    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    # Lists, because diffusers concatenates them with lists.
    _optional_components: ClassVar = ["text_encoder", "text_encoder_2", "tokenizer_2"]
    _lora_loadable_modules: ClassVar = ["unet", "text_encoder", "subject_net"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection,
        feature_extractor: CLIPImageProcessor,
        subject_net: ModelMixin,
        reference_background: str = "white",
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        force_zeros_for_empty_prompt: bool | None = None,
    ) -> None:
        """text_encoder: the base's own, for `alpha` above 0, else dispensable. reference_background: how references
        were prepared in training; for `photo` they are put on white here, as the released code does. text_encoder_2,
        tokenizer_2, force_zeros_for_empty_prompt: Stable Diffusion XL's, as dispensable."""
        super().__init__()
        admit_subjects(unet)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            subject_net=subject_net,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        if of_another_base(
            base_layers(unet, text_encoder, text_encoder_2), subject_net.config.get("base_weights") or {}
        ):
            warnings.warn(
                "subject_net was trained on another base: keys and values of the text, the first convolution and the "
                "text encoder are that one's; load the pipeline with its own base, and use with_base",
                stacklevel=2,
            )
        self._subject_scale, self._interrupt, self._num_timesteps = 1.0, False, 0
        self.register_to_config(
            reference_background=reference_background, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.prompt_tokenizer = PromptTokenizer(
            tokenizer, subject_net.text_encoder.config.max_position_embeddings, subject_net.max_subjects
        )

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As diffusers does; options: its own. The folder also carries the pipeline's code, so that
        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` reads it where diffusers alone is
        installed. Raises ModelError."""
        if options.get("push_to_hub"):
            raise ModelError("save_pretrained(push_to_hub=True) would leave the code out: call pipe.push_to_hub(name)")
        super().save_pretrained(str(save_directory), **options)
        folder = Path(save_directory)
        for name, source in self._code().items():
            (folder / name).write_text(source)
        index = json.loads((folder / self.config_name).read_text())
        index["_class_name"] = [Path(CODE).stem, index["_class_name"]]
        index["subject_net"] = [Path(NET_CODE).stem, type(self.subject_net).__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _code(self) -> dict[str, str]:
        """The source of each file that travels along: those that these classes came from."""
        kinds = {CODE: type(self), NET_CODE: type(self.subject_net)}
        return {name: Path(inspect.getfile(kind)).read_text() for name, kind in kinds.items()}

    def set_subject_scale(self, scale: float) -> None:
        """β of the adapters, 1 at first: how strongly the references' details enter, in place of IP-Adapter's
        `set_ip_adapter_scale`. At 0 a subject is known by its word in the prompt and its place alone."""
        self._subject_scale = scale

    def load_lora_weights(self, lora: Any, adapter_name: str | None = None, **options: Any) -> None:
        """As diffusers does, and into `subject_net` as well, which has trained keys and values of the text and the text
        encoder anew. Its first convolution takes no LoRA. Raises ModelError on Stable Diffusion XL."""
        self._refuse_two_encoders("load_lora_weights")
        loaded = {name for names in self.get_list_adapters().values() for name in names}
        adapter = adapter_name or f"default_{len(loaded)}"
        super().load_lora_weights(lora, adapter_name=adapter, **options)
        copy_lora(self.subject_net, base_layers(self.unet, self.text_encoder), adapter)
        if hasattr(self.unet.conv_in, "lora_A"):
            warnings.warn(
                "this LoRA also changes the first convolution; with subjects, that of subject_net is used", stacklevel=2
            )

    def load_textual_inversion(self, *embeddings: Any, **options: Any) -> None:
        """As diffusers does, with its options. Both text encoders learn the words: that of `subject_net`, and the
        base's where there is one. A word may be a subject's tag, too. Raises ModelError on Stable Diffusion XL."""
        self._refuse_two_encoders("load_textual_inversion")
        own, known = self.subject_net.text_encoder, len(self.tokenizer)
        super().load_textual_inversion(*embeddings, text_encoder=own, **options)
        if self.text_encoder is not None:
            self.text_encoder.resize_token_embeddings(len(self.tokenizer))
            rows = self.text_encoder.get_input_embeddings().weight.data
            rows[known:] = own.get_input_embeddings().weight.data[known : len(rows)].to(rows)
        self._note_vocabulary()

    def unload_textual_inversion(self, tokens: str | list[str] | None = None) -> None:
        """As diffusers does, from both text encoders. tokens: the words to forget; default: all."""
        if self.text_encoder is not None:
            super().unload_textual_inversion(tokens, copy.deepcopy(self.tokenizer), self.text_encoder)
        super().unload_textual_inversion(tokens, self.tokenizer, self.subject_net.text_encoder)
        self._note_vocabulary()

    def _note_vocabulary(self) -> None:
        """In the configurations, from which saved weights are read again."""
        net = self.subject_net
        for encoder in (net.text_encoder, self.text_encoder):
            if encoder is not None:
                encoder.config.vocab_size = encoder.get_input_embeddings().num_embeddings
        net.register_to_config(text_config=net.config.text_config | {"vocab_size": net.text_encoder.config.vocab_size})

    def _refuse_two_encoders(self, what: str) -> None:
        if self.subject_net.second_tokens is not None:
            raise ModelError(f"{what} is for one text encoder, and Stable Diffusion XL has two: not supported here")

    def load_ip_adapter(self, *_: Any, **__: Any) -> None:
        """Raises ModelError."""
        raise ModelError("an IP-Adapter has no place here: give subjects, and set_subject_scale")

    @property
    def interrupt(self) -> bool:
        """A callback that sets `pipe._interrupt = True` ends the steps, as in diffusers' pipelines."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """How many steps the sampling under way, or the last one, has; diffusers' own callbacks ask for it."""
        return self._num_timesteps

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        subjects: Subject | Sequence[Any] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`prompt_embeds` and `negative_prompt_embeds` for a call with the same subjects, (B, T, D) each: B prompts,
        their references fused into them. Raises ModelError, also on Stable Diffusion XL."""
        self._refuse_two_encoders("encode_prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        cast = one_list_each(prompts, len(prompts), subjects)
        seen = self._see(cast, self._size(None, None, None))
        nobody: list[list[Subject]] = [[] for _ in prompts]
        negative = self._encode(one_each(negatives, len(prompts)), nobody, seen)
        return self._encode(prompts, cast, seen, clip_skip).states, negative.states

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        subjects: Subject | Sequence[Subject] | Sequence[Sequence[Subject]] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        subject_guidance_scale: float = 1.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        image: Image.Image | None = None,
        strength: float = 0.8,
        alpha: float = 0.0,
        interpolation: Interpolation = "blend",
    ) -> Any:
        """The arguments of StableDiffusionPipeline mean what they mean there. Of `cross_attention_kwargs`, there is
        `scale`, a LoRA's.

        prompt: one, with a list of subjects, or one subject; or several, with a list of subjects for each. Every
        subject's tag is in its prompt. height, width: pixels, multiples of the VAE's factor (8); by default the base's
        own, or those of `image`. guidance_scale, subject_guidance_scale: s_t and s_i of `guide`; [paper] 7.5 and 1.5.
        guidance_rescale: share of `hold_contrast`, 0.7 where the base's schedule ends in pure noise. latents:
        (N, C, h, w) noise to start from. prompt_embeds, negative_prompt_embeds: of `encode_prompt`, in place of the
        texts. image, strength: editing: starts from this image, noised by that share of the steps (SDEdit). alpha,
        interpolation: of text and image; 0 is all subject model, 1 all base. Between them each step follows (1 − α)
        times the one's prediction and α times the other's; by "switch" [paper], the subject model while t >= α·T, then
        the base alone. output_type: pil, np, pt or latent. Returns ImagePipelineOutput. Raises ModelError.
        """
        if prompt_embeds is not None or negative_prompt_embeds is not None:
            self._refuse_two_encoders("prompt_embeds")
        shape = (self.prompt_tokenizer.length, self.subject_net.text_width)
        texts = given_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, shape)
        cast = one_list_each(texts.prompts, texts.count, subjects)
        images = texts.count * num_images_per_prompt
        check_counts(images, generator, output_type, num_inference_steps, num_images_per_prompt)
        check_shares(strength, alpha, guidance_rescale)
        check_names("interpolation", [interpolation], get_args(Interpolation))
        check_names("cross_attention_kwargs", list(cross_attention_kwargs or {}), ["scale"])
        # diffusers' own callbacks say what they want.
        wanted = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        check_names("callback tensors", wanted, self._callback_tensor_inputs)
        if alpha > 0 and (not self._has_base_encoders or texts.prompts is None or negative_prompt_embeds is not None):
            raise ModelError("alpha above 0 needs all of the base's text encoders, and prompts as texts")
        size = self._size(height, width, image)

        device, dtype = self._execution_device, self.subject_net.dtype
        seen = self._see(cast, size)
        time_ids = torch.tensor([*size, 0, 0, *size], device=device, dtype=torch.float32)
        with lora_scaled([self.subject_net, self.text_encoder], (cross_attention_kwargs or {}).get("scale", 1.0)):
            if prompt_embeds is None:
                text = self._encode(texts.prompts or [], cast, seen, clip_skip)
            else:
                text = EncodedText(prompt_embeds.to(device, dtype))
            if negative_prompt_embeds is None:
                negative = self._encode(texts.negatives, [[] for _ in cast], seen)
            else:
                negative = EncodedText(negative_prompt_embeds.to(device, dtype).expand(texts.count, -1, -1))
            conditions = condition(
                self.subject_net,
                text,
                negative,
                seen,
                (size[0] // self.vae_scale_factor, size[1] // self.vae_scale_factor),
                time_ids,
                text_scale=guidance_scale,
                subject_scale=subject_guidance_scale,
                repeats=num_images_per_prompt,
            )
            base_text = self._encode_for_base(texts, num_images_per_prompt, clip_skip) if alpha > 0 else None
        steps, num_inference_steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        if image is not None:
            steps = last_steps(self.scheduler, strength, num_inference_steps)
        latents = self._start(latents, images, size, image, steps, generator)
        whole = self.scheduler.config.num_train_timesteps

        def predict(sample: Tensor, t: Tensor) -> Prediction:
            attention, scale = cross_attention_kwargs, self._subject_scale
            net, unet = self.subject_net, self.unet
            share = base_share(alpha, float(t) / whole, interpolation) if base_text is not None else 0.0
            found = []
            if share < 1:
                found.append(subject_prediction(net, unet, sample, t, conditions, guidance_scale, scale, attention))
            if base_text is not None and share > 0:
                found.append(base_prediction(unet, sample, t, base_text, time_ids, guidance_scale, attention))
            return blended(found, share)

        def after_step(i: int, t: Tensor, latents: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return latents
            changed = callback_on_step_end(self, i, t, dict.fromkeys(wanted, latents)) or {}
            kept: Tensor = changed.get("latents", latents)
            return kept

        options = {"generator": generator, "eta": eta}
        latents = self._denoise(latents, steps, predict, guidance_rescale, options, after_step)
        drawn = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(drawn) if return_dict else (drawn,)

    @property
    def _has_base_encoders(self) -> bool:
        """Whether all of the base's own text encoders are there, without which subjects are drawn as well."""
        second = self.text_encoder_2 is not None or self.subject_net.second_tokens is None
        return self.text_encoder is not None and second

    def _denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        guidance_rescale: float,
        options: dict[str, Any],
        after_step: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The steps of sampling. predict: (sample, t) -> the guided prediction, and the full branch's own; options: of
        the scheduler's `step`, of which it takes those that it knows; after_step: (i, t, latents) -> latents."""
        known = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in options.items() if name in known}
        self._interrupt, self._num_timesteps = False, len(timesteps)
        for i, t in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                continue
            guided, full = predict(self.scheduler.scale_model_input(latents, t), t)
            prediction = hold_contrast(guided, full, guidance_rescale)
            latents = self.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
            latents = after_step(i, t, latents)
        return latents

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        return self.image_processor.postprocess(decode(self.vae, latents), output_type=output_type)

    def _see(self, cast: Sequence[Sequence[Subject]], size: tuple[int, int]) -> SeenSubjects:
        device, dtype = self._execution_device, self.subject_net.dtype
        background: Any = "white" if self.config.reference_background == "photo" else self.config.reference_background
        side = self.image_encoder.config.image_size
        references, boxes, shares = stack_subjects(cast, size, side, background)
        mean, std = (
            torch.tensor(v, device=device)
            for v in (self.feature_extractor.image_mean, self.feature_extractor.image_std)
        )
        boxes, shares = boxes.to(device), shares.to(device)
        each = encode_references(
            self.image_encoder, references.to(device).flatten(1, 2), shares.flatten(1) > 0, mean, std
        )
        classes, patches = (found.to(dtype).view(*shares.shape, *found.shape[2:]) for found in each)
        mean_class = (classes * shares.to(dtype).unsqueeze(-1)).sum(dim=2)
        return SeenSubjects(
            mean_class, patches.flatten(2, 3), shares, boxes, shares.sum(dim=-1) > 0, [len(own) for own in cast]
        )

    def _encode(
        self,
        prompts: Sequence[str],
        cast: Sequence[Sequence[Subject]],
        seen: SeenSubjects,
        clip_skip: int | None = None,
    ) -> EncodedText:
        written = self.prompt_tokenizer(
            self._spelled(prompts), [self._spelled([s.tag for s in subjects]) for subjects in cast]
        )
        device = self._execution_device
        ids, placeholders = written.ids.to(device), written.placeholders.to(device)
        text: EncodedText = self.subject_net.encode_prompt(ids, placeholders, seen.classes, clip_skip or 0)
        return text

    def _spelled(self, texts: Sequence[str]) -> list[str]:
        """With every token of words of textual inversion that have several."""
        spelled: list[str] = self.maybe_convert_prompt(list(texts), self.tokenizer)
        return spelled

    def _encode_for_base(self, texts: Texts, repeats: int, clip_skip: int | None) -> EncodedText:
        """2·N, without and with the prompt, by the base's text encoders."""
        without, plain = (
            self.prompt_tokenizer(self._spelled(written), [[] for _ in written]).ids.to(self._execution_device)
            for written in (texts.negatives, texts.prompts or [])
        )
        encoders, tokens = (self.text_encoder, self.text_encoder_2), self.subject_net.second_tokens
        negative = encode_for_base(*encoders, without, tokens)
        return negative.followed_by(encode_for_base(*encoders, plain, tokens, clip_skip)).repeated(repeats)

    def _start(
        self,
        latents: Tensor | None,
        count: int,
        size: tuple[int, int],
        image: Image.Image | None,
        timesteps: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        device = self._execution_device
        shape = (count, self.vae.config.latent_channels, *(side // self.vae_scale_factor for side in size))
        noise = initial_noise(latents, shape, generator, device, self.subject_net.dtype)
        if image is None:
            return noise * float(self.scheduler.init_noise_sigma)
        pixels = self.image_processor.preprocess(image.convert("RGB"), *size).to(device, self.vae.dtype)
        return noised(self.vae, self.scheduler, pixels, noise, timesteps[:1])

    def _size(self, height: int | None, width: int | None, image: Image.Image | None) -> tuple[int, int]:
        factor, own = self.vae_scale_factor, self.unet.config.sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        if image is not None:
            own_height, own_width = image.height // factor, image.width // factor
        height, width = height or own_height * factor, width or own_width * factor
        if height < factor or width < factor or height % factor or width % factor:
            raise ModelError(f"height={height}, width={width}: both must be multiples of {factor}, and not 0")
        return height, width
