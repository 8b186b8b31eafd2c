"""Tiny bases with random weights, in the hub's folder formats: like Stable Diffusion 1.x, 2.x and XL, and a CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from model import Prompts, SubjectDiffusion, SubjectSettings, TrainingBatch

CLIP_SIZE = 32
CLIP_PATCHES = (CLIP_SIZE // 8) ** 2

_WORDS = "a the mug dog red toy robot big is on table and two in of , ."


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for rounding: on some CPUs the last bits of sums depend on where in memory the numbers lie."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def write_tokenizer(folder: Path) -> None:
    """CLIP's byte-level BPE with whole words for some nouns, and letters for everything else."""
    letters = [chr(c) for c in range(33, 127)]
    words = [f"{w}</w>" for w in _WORDS.split() if len(w) > 1]
    merges, merged = [], []
    for word in words:
        pieces = [*word.removesuffix("</w>")]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = ["".join(pieces[:2])]
            merged.append(pieces[0])
    tokens = [*letters, *[f"{x}</w>" for x in letters], *merged, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    tokenizer.save_pretrained(folder)


def write_base(folder: Path, kind: Literal["sd1", "sd2"]) -> Path:
    """Stable Diffusion 1.x's ways (one number of heads, convolutions for projections, ε) or 2.x's (a width of heads,
    linear projections, v), two levels of attention and one without."""
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_width = 16 if kind == "sd1" else 24
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4 if kind == "sd1" else (2, 4, 4),
        cross_attention_dim=text_width,
        use_linear_projection=kind == "sd2",
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(
        _text_config(tokenizer, text_width, hidden_act="gelu" if kind == "sd2" else "quick_gelu")
    )
    vae = _vae()
    scheduler = (
        PNDMScheduler(**_SCHEDULE, skip_prk_steps=True)
        if kind == "sd1"
        else DDIMScheduler(**_SCHEDULE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return folder


def write_xl_base(folder: Path) -> Path:
    """Stable Diffusion XL's ways: two text encoders, whose tokenizers pad otherwise, time ids, several transformer
    blocks at a place, and no attention at the first level; an empty prompt is zeros."""
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    tokenizer, tokenizer_2 = (CLIPTokenizer.from_pretrained(folder / "tokenizer") for _ in range(2))
    tokenizer_2.pad_token = "!"
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 3),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=16 + 24,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    pipeline = StableDiffusionXLPipeline(
        _vae(),
        CLIPTextModel(_text_config(tokenizer, 16, hidden_act="quick_gelu")),
        CLIPTextModelWithProjection(_text_config(tokenizer, 24, layers=3, hidden_act="gelu", projection_dim=20)),
        tokenizer,
        tokenizer_2,
        unet,
        EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _text_config(tokenizer: Any, width: int, layers: int = 2, **others: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **others,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )


def write_clip(folder: Path, *, whole: bool) -> Path:
    """A whole CLIP, whose vision half states another projection width than it has (as transformers writes it by
    default), or the vision half alone."""
    torch.manual_seed(1)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": CLIP_SIZE,
        "patch_size": 8,
    }
    if whole:
        text = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    else:
        CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=12)).save_pretrained(folder)
    size = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    return folder


def awaken(model: SubjectDiffusion, seed: int = 0) -> SubjectDiffusion:
    """Random numbers wherever a new model has zeros, so that every condition has its effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.subject_net.parameters():
            if parameter.count_nonzero() == 0:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        location = model.subject_net.conv_in.weight[:, -1]
        location.copy_(torch.randn(location.shape, generator=generator) * 0.5)
    return model


def training_batch(model: SubjectDiffusion, *, height: int = 8, width: int = 8, seed: int = 0) -> TrainingBatch:
    """Three images: with two subjects, one, and none; latents of the size given."""
    g = torch.Generator().manual_seed(seed)
    slots = model.settings.max_subjects
    prompts: Prompts = model.prompt_tokenizer(
        ["a red mug and a toy robot", "a dog on a table", "a table"], [["red mug", "toy robot"], ["dog"], []]
    )
    present = prompts.placeholders >= 0
    boxes = torch.zeros(3, slots, 4)
    boxes[:, 0] = torch.tensor([0.1, 0.2, 0.5, 0.9])
    boxes[:, 1] = torch.tensor([0.5, 0.1, 0.9, 0.6])
    boxes = boxes * present.unsqueeze(-1)
    references = torch.randint(0, 256, (3, slots, 3, CLIP_SIZE, CLIP_SIZE), generator=g, dtype=torch.uint8)
    classes, patches = model.encode_references(references, present)
    return TrainingBatch(
        latents=torch.randn(3, 4, height, width, generator=g),
        noise=torch.randn(3, 4, height, width, generator=g),
        timesteps=torch.tensor([10, 500, 900]),
        condition_draw=torch.ones(3),
        prompts=prompts,
        classes=classes,
        patches=patches,
        boxes=boxes,
        masks=(torch.rand(3, slots, height, width, generator=g) > 0.5).float() * present[..., None, None],
        present=present,
        time_ids=torch.tensor([[64.0, 90, 0, 13, 64, 64]]).repeat(3, 1),
    )


def settings(**changes: object) -> SubjectSettings:
    return SubjectSettings.model_validate({"max_subjects": 3, "attention_downsampling": (1, 2)} | changes)
