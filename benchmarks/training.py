"""A training step of the subject model, by variant: `python benchmarks/training.py [--batch 8 16 32 64]`.

On a GPU: Stable Diffusion 2's dimensions and OpenCLIP ViT-H's, random weights, 512 px, two subjects, in bfloat16. For
each variant, images/s of one process and their ratio to the plain step's in the same run; MFU (operations counted, as a
share of what a large matrix product reaches in the same run); what weights, gradients and AdamW's states of the trained
part take in each process; and peak memory. DDP and FSDP2 train in two processes, on two GPUs or on the CPU.
`--tiny --device cpu` takes small models, and counts the seconds that the process computed, not those that it waited for
a busy machine's cores: then the ratios alone mean something.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from model import SubjectDiffusion, SubjectSettings, TrainingBatch
from model.latents import posterior
from train.trainer.adamw import Moments
from train.trainer.low_rank import add_low_rank
from train.trainer.optimization import adamw, freeze
from train.trainer.parallel import share
from train.trainer.recipe import LrFactors, OptimizerSettings
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


@dataclass(frozen=True)
class Variant:
    """How a step is trained."""

    compiled: bool = False
    gradient_checkpointing: bool = False
    moments: Moments = "float32"
    text_encoder: bool = True
    text_encoder_rank: int = 0
    cached_latents: bool = False
    cached_references: bool = False
    strategy: Literal["ddp", "fsdp"] | None = None
    """With two processes."""


PLAIN = "plain"
VARIANTS = {
    PLAIN: Variant(),
    "compiled": Variant(compiled=True),
    "gradient checkpointing": Variant(gradient_checkpointing=True),
    "bfloat16 moments": Variant(moments="bfloat16"),
    "float8 moments": Variant(moments="float8"),
    "LoRA text encoder": Variant(text_encoder_rank=16),
    "frozen text encoder": Variant(text_encoder=False),
    "cached latents": Variant(cached_latents=True),
    "cached references": Variant(cached_references=True),
    "both cached": Variant(cached_latents=True, cached_references=True),
    "DDP": Variant(strategy="ddp"),
    "FSDP2": Variant(strategy="fsdp"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32, 64], help="images of a process")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models in place of Stable Diffusion 2's")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("a GPU is needed, and none is visible")
    found = []
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name), arguments.tiny)
        for variant in arguments.variants:
            if VARIANTS[variant].strategy is None:
                found += in_this_process(Path(name), variant, arguments)
            elif arguments.device == "cpu" or torch.cuda.device_count() > 1:
                found += in_two_processes(Path(name), variant, arguments)
    plain = {m["batch"]: m["images_per_s"] for m in found if m["variant"] == PLAIN}
    for m in found:
        m["ratio"] = m["images_per_s"] / plain[m["batch"]] if m["batch"] in plain else None
    show(found)
    print(json.dumps(found))


def show(found: list[dict[str, Any]]) -> None:
    table = Table("variant", "batch", "images/s each", "ratio", "MFU", "trained part MiB", "peak GiB", box=None)
    for m in found:
        speed, ratio = f"{m['images_per_s']:.2f}", "" if m["ratio"] is None else f"{m['ratio']:.2f}"
        peak = "" if m["peak_gib"] is None else f"{m['peak_gib']:.1f}"
        row = (speed, ratio, f"{m['mfu']:.3f}", f"{m['trained_mib']:.1f}", peak)
        table.add_row(m["variant"], str(m["batch"]), *row)
    Console(stderr=True).print(table)


def in_two_processes(folder: Path, variant: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    spawn(_process, (folder, variant, arguments), nprocs=2)
    measured: list[dict[str, Any]] = json.loads((folder / "measured.json").read_text())
    return measured


def _process(rank: int, folder: Path, variant: str, arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if arguments.device == "cuda" else "gloo"
    rendezvous = f"file://{folder}/{VARIANTS[variant].strategy}.rendezvous"
    distributed.init_process_group(backend, rendezvous, rank=rank, world_size=2)
    measured = in_this_process(folder, variant, arguments)
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    distributed.destroy_process_group()


def in_this_process(folder: Path, variant: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each batch size, unless memory does not suffice."""
    device = torch.device(arguments.device)
    measured = (measure(folder, VARIANTS[variant], size, device, arguments.tiny) for size in arguments.batch)
    return [{"variant": variant, **m} for m in measured if m is not None]


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


def measure(folder: Path, variant: Variant, images: int, device: torch.device, tiny: bool) -> dict[str, Any] | None:
    """Measures STEPS training steps on one batch, after two to warm up; None where memory does not suffice."""
    model, factors = prepared(folder, variant, device), LrFactors(text_encoder=float(variant.text_encoder))
    shared = share(model, variant.strategy or "ddp", torch.bfloat16)
    named = {name: p for name, p in model.subject_net.named_parameters() if p.requires_grad}
    optimizer = adamw(named, OptimizerSettings(steps=1, lr=1e-6, moments=variant.moments, lr_factors=factors))
    throughput = Throughput(device, torch.bfloat16)
    inputs = random_inputs(model, images, 128 if tiny else 512, device)
    latents, references = encoders(model, variant, inputs.pop("pixels"), inputs.pop("references"), inputs["present"])
    trained_bytes = 0

    def step() -> None:
        nonlocal trained_bytes
        batch = training_batch(model, latents(), references(), **inputs)
        with torch.autocast(device.type, torch.bfloat16):
            losses = shared(batch)
        (losses.diffusion.mean() + model.settings.attention_weight * losses.attention.mean()).backward()
        optimizer.step()
        trained_bytes = sum(of.nbytes for of in trained_tensors(optimizer))
        optimizer.zero_grad()

    try:
        throughput.count(step, images)
        if variant.compiled:
            # The C++ compiler takes minutes, whatever the size.
            model.compile(backend="aot_eager" if tiny else "inductor")
        for _ in range(2):
            step()
        wait(device)
        throughput.forget()
        computed_s = time.process_time()
        for _ in range(STEPS):
            step()
            throughput.add(images)
        computed_s = time.process_time() - computed_s
        found = throughput.look()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    kept = {"peak_gib": found.get("gpu_memory_gib"), "trained_mib": trained_bytes / 2**20}
    speed = STEPS * images / computed_s if device.type == "cpu" else found["images_per_s"]
    return {"batch": images, "images_per_s": speed, "mfu": found["mfu"], **kept}


def prepared(folder: Path, variant: Variant, device: torch.device) -> SubjectDiffusion:
    """The model as the trainer makes it, before processes share it."""
    torch.manual_seed(0)
    settings = SubjectSettings(max_subjects=SUBJECTS)
    model = SubjectDiffusion.from_base(folder / "base", settings, folder / "clip", torch.bfloat16)
    if variant.text_encoder_rank:
        add_low_rank(model.subject_net, variant.text_encoder_rank)
    freeze(model.subject_net, LrFactors(text_encoder=float(variant.text_encoder)))
    model.to(device).train()
    if variant.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def trained_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Weights, gradients and states, of which this process may have a part."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for tensor in (parameter, parameter.grad, *optimizer.state[parameter].values()):
                if tensor is not None:
                    yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
        "time_ids": torch.tensor([[size_px, size_px, 0, 0, size_px, size_px]]).repeat(images, 1).float(),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()} | {"prompts": prompts}


def encoders(
    model: SubjectDiffusion, variant: Variant, pixels: Tensor, references: Tensor, present: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, Tensor]]]:
    """What encodes the images, and what the references; where the variant has caches, it has done so already."""
    latents = functools.partial(posterior, model.vae, pixels)
    encoded = functools.partial(model.encode_references, references, present)
    known, seen = latents() if variant.cached_latents else None, encoded() if variant.cached_references else None
    return (latents if known is None else lambda: known), (encoded if seen is None else lambda: seen)


def training_batch(
    model: SubjectDiffusion, encoded: Tensor, references: tuple[Tensor, Tensor], **rest: Any
) -> TrainingBatch:
    """As the trainer makes it. encoded: what the VAE takes images for, of `model.latents.posterior`; references: what
    CLIP takes references for."""
    classes, patches = references
    batch = TrainingBatch(latents=model.draw_latents(encoded), classes=classes, patches=patches, **rest)
    return batch.to(encoded.device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
