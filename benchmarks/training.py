"""The full-size model on a GPU: `python benchmarks/training.py [--batch 8 16 32 64]`.

Stable Diffusion 2's dimensions and OpenCLIP ViT-H's, random weights, 512 px, two subjects: images/s, peak memory and
MFU (operations counted, as a share of what a large matrix product reaches in the same run) of a training step in
bfloat16 with AdamW, as it is and compiled. `--tiny --device cpu` runs the same lines on small models, to see that they
run; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from model import SubjectDiffusion, SubjectSettings, TrainingBatch
from train.trainer.throughput import Throughput

TOKENIZER = Path(__file__).parents[1] / "toyworld/weights/clip"
STEPS = 10
SUBJECTS = 2

TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
          "image_size": 224, "patch_size": 14, "projection_dim": 1024}  # fmt: skip
UNET = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": (5, 10, 20, 20)}
VAE = (128, 256, 512, 512)
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
               "image_size": 28, "patch_size": 14, "projection_dim": 32}  # fmt: skip
TINY_UNET = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "attention_head_dim": (2, 2, 2, 2)}
TINY_VAE = (8, 8, 8, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models in place of Stable Diffusion 2's")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("a GPU is needed, and none is visible")
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), arguments.tiny)
        model = SubjectDiffusion.from_base(
            Path(folder) / "base", SubjectSettings(max_subjects=SUBJECTS), Path(folder) / "clip", torch.bfloat16
        )
    model.to(device).train()
    if arguments.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    found = [
        measured
        for compiled in (False, True)
        for size in arguments.batch
        if (measured := measure(model, size, device, compiled, arguments.tiny)) is not None
    ]
    table = Table("batch", "compiled", "images/s", "peak GiB", "MFU", box=None)
    for m in found:
        memory = "" if m["peak_gib"] is None else f"{m['peak_gib']:.1f}"
        row = (str(m["batch"]), "yes" if m["compiled"] else "", f"{m['images_per_s']:.2f}", memory, f"{m['mfu']:.3f}")
        table.add_row(*row)
    Console(stderr=True).print(table)
    print(json.dumps(found))


def write_models(folder: Path, tiny: bool) -> None:
    """A Stable Diffusion folder and a CLIP vision folder, with random weights."""
    text, vision = (TINY_TEXT, TINY_VISION) if tiny else (TEXT, VISION)
    unet, vae = (TINY_UNET, TINY_VAE) if tiny else (UNET, VAE)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=vae,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=4 if tiny else 32,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, **ids, hidden_act="gelu", max_position_embeddings=77)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=64, cross_attention_dim=text["hidden_size"], use_linear_projection=True, **unet
        ),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "base")
    CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)).save_pretrained(folder / "clip")
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder / "clip")


def measure(
    model: SubjectDiffusion, images: int, device: torch.device, compiled: bool, tiny: bool
) -> dict[str, Any] | None:
    """Measures STEPS training steps on one batch, after two to warm up; None where memory does not suffice."""
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-6)
    throughput = Throughput(device, torch.bfloat16)
    # The C++ compiler takes minutes, whatever the size.
    run = torch.compile(model, backend="aot_eager" if tiny else "inductor") if compiled else model
    inputs = random_inputs(model, images, 128 if tiny else 512, device)

    def step(call: Any) -> None:
        batch = training_batch(model, **inputs)
        with torch.autocast(device.type, torch.bfloat16):
            losses = call(batch)
        (losses.diffusion.mean() + model.settings.attention_weight * losses.attention.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        throughput.count(lambda: step(model), images)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step(run)
        wait(device)
        throughput.forget()
        started = time.perf_counter()
        for _ in range(STEPS):
            step(run)
            throughput.add(images)
        wait(device)
        seconds = time.perf_counter() - started
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    speed = {"images_per_s": STEPS * images / seconds, "mfu": throughput.look()["mfu"]}
    return {"batch": images, "compiled": compiled, "peak_gib": peak, **speed}


def random_inputs(model: SubjectDiffusion, images: int, size_px: int, device: torch.device) -> dict[str, Any]:
    side = size_px // model.latent_factor
    prompts = model.prompt_tokenizer(["a mug and a fish on a table"] * images, [["mug", "fish"]] * images)
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.5, 0.4, 0.9, 0.9]]).expand(images, SUBJECTS, 4)
    reference_px = (model.reference_size,) * 2
    inputs = {
        "pixels": torch.randint(0, 256, (images, 3, size_px, size_px), dtype=torch.uint8),
        "references": torch.randint(0, 256, (images, SUBJECTS, 3, *reference_px), dtype=torch.uint8),
        "noise": torch.randn(images, 4, side, side),
        "timesteps": torch.randint(0, model.num_train_timesteps, (images,)),
        "condition_draw": torch.ones(images),
        "boxes": boxes.contiguous(),
        "masks": (torch.rand(images, SUBJECTS, side, side) > 0.7).float(),
        "present": torch.ones(images, SUBJECTS, dtype=torch.bool),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()} | {"prompts": prompts}


def training_batch(model: SubjectDiffusion, pixels: Tensor, references: Tensor, **rest: Any) -> TrainingBatch:
    """As the trainer makes it, frozen encoders included."""
    classes, patches = model.encode_references(references, rest["present"])
    batch = TrainingBatch(latents=model.encode_images(pixels), classes=classes, patches=patches, **rest)
    return batch.to(pixels.device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
