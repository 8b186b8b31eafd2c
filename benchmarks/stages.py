"""What batching gives: each model stage on batches against one image at a time.

`python benchmarks/stages.py` times the toy models on this machine's CPU. With `--full-size`, on a GPU: BLIP-2 (OPT
2.7B), Grounding DINO Swin-T and SAM ViT-H with random weights, in bfloat16, compiled and batched, against float32 one
image at a time, with peak memory and the share of the chip's matrix rate, which is measured in the same run.
`--full-size --tiny --device cpu` runs those same lines on small models, to see that they run; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from datapipe.recipe import build_stage, load_recipe
from datapipe.schema import Entity, Sample, StageName, Tag
from toyworld.render import render_scene

MODEL_STAGES = (StageName.CAPTION, StageName.GROUND, StageName.SEGMENT)
BOXES_AN_IMAGE = 3


@dataclass(frozen=True)
class Rig:
    """Where the networks are timed. `tiny`: small ones, uncompiled."""

    device: torch.device
    tiny: bool

    @property
    def matrix_side(self) -> int:
        return 128 if self.tiny else 8192

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_memory_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None


@dataclass(frozen=True)
class Measurement:
    """One line of the report: images per second both ways. Peak memory and the share of the matrix rate are of the
    batched way; None where they mean nothing."""

    name: str
    one_at_a_time: float
    batched: float
    memory_gib: float | None = None
    share_of_matrix_rate: float | None = None

    @property
    def ratio(self) -> float:
        return self.batched / self.one_at_a_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="random weights of the published sizes, on a GPU")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of --full-size")
    parser.add_argument("--tiny", action="store_true", help="small models in place of the published sizes")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    arguments = parser.parse_args()
    if not arguments.full_size:
        found = toy(arguments.images, arguments.batch)
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--full-size needs a GPU, and none is visible")
    else:
        rig = Rig(torch.device(arguments.device), arguments.tiny)
        found = full_size(arguments.images, arguments.batch, rig)
    report(found, arguments.json)


def toy(images: int, batch: int) -> list[Measurement]:
    """The stages of the toy recipe, decoding included, with one thread."""
    torch.set_num_threads(1)
    samples = [toy_sample(row) for row in range(images)]
    found = []
    for name in MODEL_STAGES:
        stage = build_stage(name, load_recipe("toy"))
        singly = images_a_second(stage, samples, 1)
        found.append(Measurement(name.value, singly, images_a_second(stage, samples, batch)))
    return found


def toy_sample(row: int) -> Sample:
    """A scene with its true tags, and boxes for the segmenter."""
    scene = render_scene(row, size=160, split="heldout")
    _, data = cv2.imencode(".jpg", scene.image[..., ::-1])
    tags = tuple(dict.fromkeys(Tag(s.tag, s.span) for s in scene.subjects))
    boxes = [s.box for s in scene.subjects]
    candidates = tuple(Entity("mug", (0, 1), boxes[i % len(boxes)], 1.0, 1.0) for i in range(BOXES_AN_IMAGE))
    return Sample(
        row=row, image=bytes(data), width=160, height=160, caption=scene.caption, tags=tags, candidates=candidates
    )


def images_a_second(stage: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample], batch: int) -> float:
    stage(samples[:batch])
    started = time.perf_counter()
    for start in range(0, len(samples), batch):
        stage(samples[start : start + batch])
    return len(samples) / (time.perf_counter() - started)


@dataclass(frozen=True)
class Network:
    """`call`: what is timed; `compiled`: the modules that torch.compile is given; `mixed`: bfloat16 by autocast."""

    model: torch.nn.Module
    call: Callable[..., Any]
    compiled: Sequence[torch.nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    mixed: bool = False


def full_size(images: int, batch: int, rig: Rig) -> list[Measurement]:
    """The networks alone, on random pixels."""
    peak_flops = matrix_rate(rig)
    return [
        compared(name, build, images, batch, rig, peak_flops)
        for name, build in (
            ("SAM ViT-H encoder, 1024 px", sam_encoder),
            ("Grounding DINO Swin-T, 800 x 1088 px", grounding_dino),
            ("BLIP-2 OPT 2.7B, 20 tokens", blip2),
        )
    ]


def compared(
    name: str, build: Callable[[bool], Network], images: int, batch: int, rig: Rig, peak_flops: float
) -> Measurement:
    """float32 one at a time, then bfloat16 compiled in batches, of the same weights."""
    torch.manual_seed(0)
    network = build(rig.tiny)
    # The flop counter stumbles over parameters that want gradients where none are kept.
    model = network.model.to(rig.device).eval().requires_grad_(False)
    one = moved(network.inputs(1), rig.device, torch.float32)
    singly = rate(network.call, one, min(images, 8), 1, rig)
    with FlopCounterMode(display=False) as counter:
        run(network.call, one)
    if not network.mixed:
        model.to(torch.bfloat16)
    if not rig.tiny:
        for part in network.compiled:
            part.compile()
    if rig.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    many = moved(network.inputs(batch), rig.device, torch.float32 if network.mixed else torch.bfloat16)
    with torch.autocast(rig.device.type, torch.bfloat16, enabled=network.mixed):
        batched = rate(network.call, many, images, batch, rig)
    share = batched * counter.get_total_flops() / peak_flops
    return Measurement(name, singly, batched, rig.peak_memory_gib(), share)


def sam_encoder(tiny: bool) -> Network:
    from transformers import SamConfig, SamModel, SamVisionConfig

    # facebook/sam-vit-huge
    sizes: dict[str, Any] = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120}
    sizes |= {"global_attn_indexes": [7, 15, 23, 31], "image_size": 1024}
    if tiny:
        sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 16}
        sizes |= {"global_attn_indexes": [1], "image_size": 64}
    model = SamModel(SamConfig(vision_config=SamVisionConfig(**sizes))).vision_encoder
    side = sizes["image_size"]
    return Network(model, model, [model], lambda n: {"pixel_values": torch.randn(n, 3, side, side)})


def grounding_dino(tiny: bool) -> Network:
    """As the stage runs it: weights in float32, matrix products in bfloat16."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    # IDEA-Research/grounding-dino-tiny
    sizes: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    more: dict[str, Any] = {}
    height, width = 800, 1088
    if tiny:
        sizes |= {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
        layers = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
        more = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 10, "text_config": layers}
        height, width = 64, 96
    swin = SwinConfig(image_size=224, out_indices=[2, 3, 4], **sizes)
    model = GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=swin, **more))
    return Network(model, model, [model], lambda n: grounding_inputs(n, height, width), mixed=True)


def grounding_inputs(count: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """A prompt of five nouns: [CLS] noun . noun . … [SEP]."""
    prompt = torch.tensor([[101, *(token for noun in range(2000, 2005) for token in (noun, 1012)), 102]])
    return {
        "pixel_values": torch.randn(count, 3, height, width),
        "input_ids": prompt.expand(count, -1),
        "attention_mask": torch.ones_like(prompt).expand(count, -1),
        "token_type_ids": torch.zeros_like(prompt).expand(count, -1),
    }


def blip2(tiny: bool) -> Network:
    """Compiled in its vision tower and Q-Former: the language model's cache grows at every token."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    # Salesforce/blip2-opt-2.7b
    sizes: dict[str, Any] = {
        "hidden_size": 2560,
        "word_embed_proj_dim": 2560,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
    }
    sizes |= {"num_attention_heads": 32, "vocab_size": 50304}
    towers: dict[str, Any] = {}
    image_token, side = 50265, 224
    if tiny:
        sizes |= {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "vocab_size": 64}
        tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        towers = {"vision_config": tower | {"image_size": 28, "patch_size": 14}}
        towers["qformer_config"] = tower | {"encoder_hidden_size": 16, "vocab_size": 64}
        image_token, side = 63, 28
    config = Blip2Config(text_config=OPTConfig(**sizes).to_dict(), image_token_index=image_token, **towers)
    model = Blip2ForConditionalGeneration(config)

    def caption(pixel_values: torch.Tensor) -> Any:
        return model.generate(pixel_values, max_new_tokens=20, min_new_tokens=20, do_sample=False)

    parts = [model.vision_model, model.qformer]
    return Network(model, caption, parts, lambda n: {"pixel_values": torch.randn(n, 3, side, side)})


def moved(inputs: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """On the device, floating ones in `dtype`."""
    return {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in inputs.items()}


def rate(call: Callable[..., Any], inputs: dict[str, torch.Tensor], images: int, batch: int, rig: Rig) -> float:
    """Images per second after warm-up and compilation."""
    for _ in range(3):
        run(call, inputs)
    repeats = max(2, images // batch)
    rig.wait()
    started = time.perf_counter()
    for _ in range(repeats):
        run(call, inputs)
    rig.wait()
    return repeats * batch / (time.perf_counter() - started)


@torch.inference_mode()
def run(call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> None:
    call(**inputs)


def matrix_rate(rig: Rig) -> float:
    """FLOP/s of a large bfloat16 matrix product on random data."""
    side = rig.matrix_side
    a, b = (torch.randn(side, side, device=rig.device, dtype=torch.bfloat16) for _ in range(2))
    products_a_second = rate(torch.mm, {"input": a, "mat2": b}, 10, 1, rig)
    return 2 * side**3 * products_a_second


def report(found: Sequence[Measurement], file: Path | None) -> None:
    headings = ("stage", "one at a time, images/s", "batched, images/s", "ratio", "peak GiB", "of matrix rate")
    table = Table(*headings, box=None)
    for m in found:
        memory = "" if m.memory_gib is None else f"{m.memory_gib:.1f}"
        share = "" if m.share_of_matrix_rate is None else f"{m.share_of_matrix_rate:.0%}"
        table.add_row(m.name, f"{m.one_at_a_time:.1f}", f"{m.batched:.1f}", f"{m.ratio:.2f}", memory, share)
    Console().print(table)
    measurements = json.dumps([asdict(m) | {"ratio": m.ratio} for m in found])
    print(measurements)
    if file is not None:
        file.write_text(measurements + "\n")


if __name__ == "__main__":
    main()
