"""The full-size models, with random weights, on one photograph and one training step:
`python -m benchmarks.full_size [--device cpu] [--stages caption ground segment train]`.

Each stage runs in a process of its own, through the code that a run has: BLIP-large, Grounding DINO Swin-T and SAM
ViT-H as the recipe `sdd` loads and calls them, and a training step of Stable Diffusion 2 with ViT-H at 512 px, frozen
weights in bfloat16. Seconds are those of the second call; in the first, floating point operations are counted. Memory
is the most that the process took; on a CPU that includes writing and loading the weights.

`--device pretend` runs on the CPU what a GPU would get, in its precision, and stops at a tensor that was left on the
wrong device (without the backward pass; see `pretend_gpu`). `--tiny` takes small models, to see that the lines run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    BlipForConditionalGeneration,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SamModel,
    SwinConfig,
)

from benchmarks.pretend_gpu import pretended_gpu
from benchmarks.training import SUBJECTS, random_inputs, training_batch, write_models
from datapipe.decoding import normalize
from datapipe.probe import probe_sample
from datapipe.recipe import build_stage, load_recipe
from datapipe.schema import Sample, StageName
from model import SubjectDiffusion, SubjectSettings
from model.latents import posterior

TOYS = Path(__file__).parents[1] / "toyworld/weights"
"""Tokenizers and image processors in the formats of the hub."""
TRAIN = "train"
STAGES = (StageName.CAPTION.value, StageName.GROUND.value, StageName.SEGMENT.value, TRAIN)
BOXES = 3
SIZE = (1024, 768)

BLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 384, "patch_size": 16}  # fmt: skip
BLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "vocab_size": 30524, "max_position_embeddings": 512, "encoder_hidden_size": 1024}  # fmt: skip
SWIN_T = {"image_size": 224, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7,
          "out_indices": [2, 3, 4]}  # fmt: skip
VIT_H = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120, "image_size": 1024,
         "patch_size": 16, "output_channels": 256, "window_size": 14, "num_pos_feats": 128, "scale": 640,
         "global_attn_indexes": [7, 15, 23, 31]}  # fmt: skip
SAM_PROMPTS = {"hidden_size": 256, "image_size": 1024, "patch_size": 16, "image_embedding_size": 64}
SAM_DECODER = {"hidden_size": 256, "mlp_dim": 2048, "num_attention_heads": 8, "iou_head_hidden_dim": 256}

Call = Callable[[], object]


@dataclass(frozen=True)
class Cost:
    """`load_s`: until the models had their weights; `memory_gib`: the most that the process took, of the GPU where
    there is one."""

    stage: str
    load_s: float
    seconds: float
    tera_flop: float
    memory_gib: float


@dataclass(frozen=True)
class Job:
    """What a process measures. `device`: cpu, cuda or pretend."""

    stage: str
    device: str
    tiny: bool
    image: Path | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda", "pretend"), default="cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--image", type=Path, help="a photograph; default: a drawn image of 1024 x 768 pixels")
    parser.add_argument("--tiny", action="store_true", help="small models in place of the full-size ones")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("a GPU is needed, and none is visible")
    found: list[Cost] = []
    for stage in arguments.stages:
        print(f"{stage} …", file=sys.stderr, flush=True)
        found.append(in_own_process(Job(stage, arguments.device, arguments.tiny, arguments.image)))
        print(f"{stage}: {found[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    table = Table("stage", "load s", "s", "TFLOP", "peak GiB", box=None)
    for cost in found:
        figures = (cost.load_s, cost.seconds, cost.tera_flop, cost.memory_gib)
        table.add_row(cost.stage, *(f"{figure:.3g}" for figure in figures))
    Console(stderr=True).print(table)
    print(json.dumps([asdict(cost) for cost in found]))


def in_own_process(job: Job) -> Cost:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, job))
    process.start()
    sender.close()  # so that a process that dies is an end of file
    try:
        cost: Cost = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{job.stage}: its process ended with code {process.exitcode}") from None
    process.join()
    return cost


def _send(sender: Connection, job: Job) -> None:
    sender.send(measured(job))


def measured(job: Job) -> Cost:
    """Loads the stage's models and calls it twice."""
    with contextlib.ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        write = write_models if job.stage == TRAIN else write_labeler(job.stage)
        write(folder, job.tiny)
        if job.device == "pretend":
            resources.enter_context(pretended_gpu())
        device = torch.device("cpu" if job.device == "cpu" else "cuda")
        started = time.perf_counter()
        call = training_step(folder, job.tiny, job.device) if job.stage == TRAIN else labeling(folder, job, device)
        load_s = time.perf_counter() - started
        with FlopCounterMode(display=False) as counter:
            call()
        seconds = timed(call, job.device)
    return Cost(job.stage, load_s, seconds, counter.get_total_flops() / 1e12, peak_gib(job.device))


def timed(call: Call, device: str) -> float:
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_labeler(stage: str) -> Callable[[Path, bool], None]:
    """What writes a model with random weights as the hub has it; the tiny one is the toy world's."""

    def write(folder: Path, tiny: bool) -> None:
        toy = {"caption": "blip", "ground": "grounding-dino", "segment": "sam"}[stage]
        for file in (TOYS / toy).iterdir():
            if tiny or file.name != "model.safetensors":
                (folder / file.name).symlink_to(file)
        if not tiny:
            {"caption": _write_blip, "ground": _write_grounding_dino, "segment": _write_sam}[stage](folder)

    return write


def _write_blip(folder: Path) -> None:
    config = AutoConfig.from_pretrained(TOYS / "blip")
    config.vision_config.update(BLIP_LARGE)
    config.text_config.update(BLIP_TEXT)
    config.image_text_hidden_size = 256
    _save(BlipForConditionalGeneration(config), folder)
    _resize_processor(folder, {"size": {"height": 384, "width": 384}})


def _write_grounding_dino(folder: Path) -> None:
    _save(GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=SwinConfig(**SWIN_T))), folder)


def _write_sam(folder: Path) -> None:
    config = AutoConfig.from_pretrained(TOYS / "sam")
    config.vision_config.update(VIT_H)
    config.prompt_encoder_config.update(SAM_PROMPTS)
    config.mask_decoder_config.update(SAM_DECODER)
    _save(SamModel(config), folder)
    _resize_processor(folder, {"size": {"longest_edge": 1024}, "pad_size": {"height": 1024, "width": 1024}})


def _save(model: Any, folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)


def _resize_processor(folder: Path, sizes: dict[str, Any]) -> None:
    path = folder / "processor_config.json"
    tree = json.loads(path.read_text())
    tree["image_processor"].update(sizes)
    path.unlink()  # a link to the toy's
    path.write_text(json.dumps(tree))


def labeling(folder: Path, job: Job, device: torch.device) -> Call:
    """The stage of the recipe `sdd`, and a sample with what it needs."""
    small = [f"ground.{side}_side=128" for side in ("short", "long")] if job.tiny else []
    recipe = load_recipe("sdd", [f"{job.stage}.model={folder}", f"{job.stage}.device={device.type}", *small])
    stage = build_stage(StageName(job.stage), recipe)
    sample = photograph(job.image)

    def call() -> None:
        stage([sample])

    return call


def photograph(path: Path | None) -> Sample:
    sample = probe_sample(SIZE, BOXES)
    if path is None:
        return sample
    image = normalize(path.read_bytes(), max_pixels=100_000_000)
    width, height = image.width / SIZE[0], image.height / SIZE[1]
    candidates = tuple(
        replace(entity, box=(x1 * width, y1 * height, x2 * width, y2 * height))
        for entity in sample.candidates
        for x1, y1, x2, y2 in [entity.box]
    )
    return sample.replace(image=image.data, width=image.width, height=image.height, candidates=candidates)


def training_step(folder: Path, tiny: bool, device: str) -> Call:
    """Frozen encoders, the loss of one image, its gradient and AdamW; on a pretended GPU without the gradient."""
    model = SubjectDiffusion.from_base(
        folder / "base", SubjectSettings(max_subjects=SUBJECTS), folder / "clip", torch.bfloat16
    )
    place = torch.device("cpu" if device == "cpu" else "cuda")
    model.to(place).train()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-6)
    inputs = random_inputs(model, 1, 128 if tiny else 512, place)
    references = inputs.pop("references")
    pixels = inputs.pop("pixels")

    def step() -> None:
        encoded = model.encode_references(references, inputs["present"])
        batch = training_batch(model, posterior(model.vae, pixels), encoded, **inputs)
        with torch.autocast(place.type, torch.bfloat16):
            losses = model(batch)
        loss = losses.diffusion.mean() + model.settings.attention_weight * losses.attention.mean()
        if device != "pretend":
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss).item()

    return step


if __name__ == "__main__":
    main()
