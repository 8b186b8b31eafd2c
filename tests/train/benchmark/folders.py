"""Folders that a benchmark reads: backbones in hub format with random weights, photographs drawn by the toy world in
the layout of the DreamBooth dataset, and a pipeline on the toy base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from PIL import Image

from model import SubjectDiffusion, SubjectDiffusionPipeline, SubjectSettings
from tests.toy import PROJECT
from toyworld.render import render_scene, sample_identity

CLIP = PROJECT / "toyworld/weights/clip"
SUBJECTS = {"mug": "mug", "mug2": "mug", "cat": "cat"}
PROMPTS = {"Object": ["a {0} {1} on grass", "a red {0} {1}"], "Live Subject": ["a {0} {1} in a hat", "a red {0} {1}"]}
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_vit(folder: Path, patch_px: int = 8, pooler: bool = True) -> Path:
    """Like dino-vits16 and dino-vits8."""
    torch.manual_seed(patch_px)
    config = transformers.ViTConfig(**TINY, image_size=32, patch_size=patch_px)
    transformers.ViTModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    ).save_pretrained(folder)
    return folder


def write_dinov2(folder: Path) -> Path:
    torch.manual_seed(2)
    config = transformers.Dinov2Config(**{k: v for k, v in TINY.items() if k != "intermediate_size"}, image_size=42)
    transformers.Dinov2Model(config).save_pretrained(folder)
    transformers.BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42}).save_pretrained(
        folder
    )
    return folder


def write_siglip2(folder: Path) -> Path:
    torch.manual_seed(3)
    vision = {**TINY, "num_patches": 16, "patch_size": 8}
    config = transformers.Siglip2Config(text_config={**TINY, "vocab_size": 8}, vision_config=vision)
    transformers.Siglip2Model(config).save_pretrained(folder)
    transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return folder


def write_dreambench(folder: Path, photographs: int = 3, pairs: bool = True) -> Path:
    """Scenes of one individual for each subject, and two prompts; beside the folder, the pairs."""
    for name, noun in SUBJECTS.items():
        (folder / name).mkdir(parents=True)
        individual = sample_identity(noun, int(name == "mug2"), "heldout")
        for number in range(photographs):
            scene = render_scene(number, size=96, split="heldout", identities=[individual])
            Image.fromarray(scene.image).save(folder / name / f"{number:02d}.jpg", quality=95)
    lines = ["Classes", "", "subject_name,class", *(f"{name},{noun}" for name, noun in SUBJECTS.items()), "", "Prompts"]
    for kind, prompts in PROMPTS.items():
        entries = ",\n".join(f"'{prompt}'.format(unique_token, class_token)" for prompt in prompts)
        lines += ["", f"{kind} Prompts", "", "prompt_list = [", entries, "]"]
    (folder / "prompts_and_classes.txt").write_text("\n".join(lines) + "\n")
    if pairs:
        asked = [
            {
                "references": ["mug/01.jpg", "cat/00.jpg"],
                "prompts": ["a mug and a cat on grass", "a red mug and a red cat"],
            },
            {"references": ["mug/00.jpg", "mug2/00.jpg"], "prompts": ["a mug and a mug on grass"]},
        ]
        (folder.parent / "dreambench_pairs.json").write_text(json.dumps({"source": "toy", "pairs": asked}))
    return folder


def write_pipeline(folder: Path) -> Path:
    """The toy base and a subject net that was not trained."""
    torch.manual_seed(4)
    settings = SubjectSettings(max_subjects=2, attention_downsampling=(1, 2))
    model = SubjectDiffusion.from_base(PROJECT / "toyworld/weights/stable-diffusion", settings, CLIP)
    SubjectDiffusionPipeline.from_model(model).save_pretrained(folder)
    return folder
