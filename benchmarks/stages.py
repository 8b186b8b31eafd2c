"""What batching gives: each model stage on batches against one image at a time.

`python benchmarks/stages.py` times the toy models on this machine's CPU. With `--full-size`, on a GPU: BLIP-2 (OPT
2.7B),
Grounding DINO Swin-T and SAM ViT-H with random weights, in bfloat16, compiled and batched, against float32 one image
at a
time, with peak memory and the share of the chip's matrix rate, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
MATRIX_SIDE = 8192


@dataclass(frozen=True)
class Measurement:
    """One line of the report. Memory in GiB and rates in TFLOP/s are of the faster way; None where they mean
    nothing."""

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
    arguments = parser.parse_args()
    if arguments.full_size and not torch.cuda.is_available():
        parser.error("--full-size needs a GPU, and none is visible")
    measure = full_size if arguments.full_size else toy
    report(measure(arguments.images, arguments.batch))


def toy(images: int, batch: int) -> list[Measurement]:
    """The stages of the toy recipe, decoding included, with one thread."""
    torch.set_num_threads(1)
    samples = [toy_sample(row) for row in range(images)]
    found = []
    for name in MODEL_STAGES:
        stage = build_stage(name, load_recipe("manifests/recipes/toy.yaml"))
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


def full_size(images: int, batch: int) -> list[Measurement]:
    """The networks alone, on random pixels, on the GPU."""
    peak = matrix_rate()
    return [
        compared(name, build, inputs, images, batch, peak)
        for name, build, inputs in (
            ("SAM ViT-H encoder, 1024 px", sam_encoder, lambda n: {"pixel_values": torch.randn(n, 3, 1024, 1024)}),
            ("Grounding DINO Swin-T, 800 x 1088 px", grounding_dino, grounding_inputs),
            ("BLIP-2 OPT 2.7B, 20 tokens", blip2, lambda n: {"pixel_values": torch.randn(n, 3, 224, 224)}),
        )
    ]


def compared(
    name: str,
    build: Callable[[], tuple[Any, Callable[..., Any]]],
    inputs: Callable[[int], dict[str, torch.Tensor]],
    images: int,
    batch: int,
    peak_flops: float,
) -> Measurement:
    """float32 one at a time, then bfloat16 compiled in batches, of the same weights."""
    torch.manual_seed(0)
    model, call = build()
    model = model.cuda().eval()
    singly = rate(call, moved(inputs(1), torch.float32), min(images, 8), 1)
    with FlopCounterMode(display=False) as counter:
        run(call, moved(inputs(1), torch.float32))
    model = model.to(torch.bfloat16)
    model.forward = torch.compile(model.forward)
    torch.cuda.reset_peak_memory_stats()
    batched = rate(call, moved(inputs(batch), torch.bfloat16), images, batch)
    memory = torch.cuda.max_memory_allocated() / 2**30
    share = batched * counter.get_total_flops() / peak_flops
    del model, call
    torch.cuda.empty_cache()
    return Measurement(name, singly, batched, memory, share)


def sam_encoder() -> tuple[Any, Callable[..., Any]]:
    from transformers import SamConfig, SamModel, SamVisionConfig

    # facebook/sam-vit-huge
    sizes = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120}
    vision = SamVisionConfig(global_attn_indexes=[7, 15, 23, 31], **sizes)
    model = SamModel(SamConfig(vision_config=vision)).vision_encoder
    return model, model


def grounding_dino() -> tuple[Any, Callable[..., Any]]:
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    # IDEA-Research/grounding-dino-tiny
    sizes = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    swin = SwinConfig(image_size=224, out_indices=[2, 3, 4], **sizes)
    model = GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=swin))
    return model, model


def grounding_inputs(count: int) -> dict[str, torch.Tensor]:
    """A prompt of five nouns: [CLS] noun . noun . … [SEP]."""
    prompt = torch.tensor([[101, *(token for noun in range(2000, 2005) for token in (noun, 1012)), 102]])
    return {
        "pixel_values": torch.randn(count, 3, 800, 1088),
        "input_ids": prompt.expand(count, -1),
        "attention_mask": torch.ones_like(prompt).expand(count, -1),
        "token_type_ids": torch.zeros_like(prompt).expand(count, -1),
    }


def blip2() -> tuple[Any, Callable[..., Any]]:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    # Salesforce/blip2-opt-2.7b
    sizes = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240}
    text = OPTConfig(vocab_size=50304, num_hidden_layers=32, num_attention_heads=32, **sizes)
    model = Blip2ForConditionalGeneration(Blip2Config(text_config=text.to_dict(), image_token_index=50265))

    def caption(pixel_values: torch.Tensor) -> Any:
        return model.generate(pixel_values, max_new_tokens=20, min_new_tokens=20, do_sample=False)

    return model, caption


def moved(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """On the GPU, floating ones in `dtype`."""
    return {name: t.cuda().to(dtype if t.is_floating_point() else t.dtype) for name, t in inputs.items()}


def rate(call: Callable[..., Any], inputs: dict[str, torch.Tensor], images: int, batch: int) -> float:
    """Images per second after warm-up and compilation."""
    for _ in range(3):
        run(call, inputs)
    repeats = max(2, images // batch)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run(call, inputs)
    torch.cuda.synchronize()
    return repeats * batch / (time.perf_counter() - started)


@torch.inference_mode()
def run(call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> None:
    call(**inputs)


def matrix_rate() -> float:
    """FLOP/s of a large bfloat16 matrix product on random data."""
    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = 1 / rate(torch.mm, {"input": a, "mat2": b}, 10, 1)
    return 2 * MATRIX_SIDE**3 / seconds


def report(found: Sequence[Measurement]) -> None:
    headings = ("stage", "one at a time, images/s", "batched, images/s", "ratio", "peak GiB", "of matrix rate")
    table = Table(*headings, box=None)
    for m in found:
        memory = "" if m.memory_gib is None else f"{m.memory_gib:.1f}"
        share = "" if m.share_of_matrix_rate is None else f"{m.share_of_matrix_rate:.0%}"
        table.add_row(m.name, f"{m.one_at_a_time:.1f}", f"{m.batched:.1f}", f"{m.ratio:.2f}", memory, share)
    Console().print(table)
    print(json.dumps([asdict(m) | {"ratio": m.ratio} for m in found]))


if __name__ == "__main__":
    main()
