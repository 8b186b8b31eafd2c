"""Whether an actor keeps its GPU busy: `python benchmarks/actor.py [--images 200]`.

The stages that label are the real ones; only each network is replaced by a wait of a fixed time, which leaves the CPU
alone as the wait for a GPU does. If decoding, resizing, padding and encoding cost nothing, an actor would label as many
images per second as the network alone: the ratio of the two is the share of the time in which the GPU has work. The CPU
time of an image says how many cores a faster GPU needs; unlike the ratio, it hardly depends on what else is running.

The images have 1024 x 768 pixels and are shown to the detector at 800 x 1066 and to the segmenter at 1024 x 1024, as
`sdd.yaml` does; the segmenter gets three boxes for each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from datapipe.backends.sam import Masks
from datapipe.ledger import Ledger
from datapipe.recipe import Pool, build_stage, load_recipe
from datapipe.schema import Entity, Sample, Slice, StageName, Tag
from datapipe.stages.stage import Stage
from datapipe.workers import batches_at_once, run_stages, use_one_thread

SIZE = (1024, 768)
"""(width, height) in pixels."""
BOXES = ((100.0, 80.0, 500.0, 600.0), (300.0, 200.0, 900.0, 700.0), (600.0, 50.0, 1000.0, 400.0))
AS_IN_SDD = ("ground.short_side=800", "ground.long_side=3000", "ground.pad_multiple=1", "ground.min_boxes=0")
MICRO_BATCH = 8


@dataclass(frozen=True)
class Measurement:
    """A line of the report. `gpu_ms`: of the stand-in, for an image in all stages; `cpu_ms`: of the actor, for an
    image; rates: images/s."""

    stages: str
    gpu_ms: float
    cpu_ms: float
    at_once: int
    stand_in: float
    actor: float

    @property
    def ratio(self) -> float:
        return self.actor / self.stand_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--cpus", type=float, default=2, help="CPU cores of the actor, as in run.pools")
    parser.add_argument("--gpu-ms", type=float, default=50, help="the stand-in's time for an image, in each stage")
    arguments = parser.parse_args()
    use_one_thread()
    samples = [sample(row) for row in range(arguments.images)]
    overlapped = batches_at_once(Pool(stages=(StageName.GROUND, StageName.SEGMENT), cpus=arguments.cpus, gpus=1))
    stages = [ground(arguments.gpu_ms / 1000), segment(arguments.gpu_ms / 1000)]
    found = [
        measured(some, samples, arguments.gpu_ms * len(some), at_once)
        for some in (stages[:1], stages[1:], stages)
        for at_once in (1, overlapped)
    ]
    report(found)


def sample(row: int) -> Sample:
    """A picture as rich in detail as a photograph, with a tag, and boxes for the segmenter."""
    noise = np.random.default_rng(row).integers(0, 255, (96, 128, 3), np.uint8)
    _, data = cv2.imencode(".jpg", cv2.resize(noise, SIZE, interpolation=cv2.INTER_CUBIC))
    candidates = tuple(Entity("mug", (2, 5), box, 1.0, 1.0) for box in BOXES)
    return Sample(
        row=row,
        image=bytes(data),
        width=SIZE[0],
        height=SIZE[1],
        caption="a mug",
        tags=(Tag("mug", (2, 5)),),
        candidates=candidates,
    )


def ground(image_s: float) -> Stage:
    """The stage with a stand-in that waits, then finds the boxes."""
    stage: Any = build_stage(StageName.GROUND, load_recipe("toy", [*AS_IN_SDD, f"ground.micro_batch={MICRO_BATCH}"]))
    x1, y1, x2, y2 = (torch.tensor(BOXES) / torch.tensor(SIZE * 2)).unbind(1)
    boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)

    def forward(pixels: torch.Tensor, mask: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(image_s * len(pixels))
        return torch.full((len(pixels), len(BOXES), 256), 0.9), boxes.expand(len(pixels), -1, -1)

    stage._detect._forward = forward
    return stage  # type: ignore[no-any-return]  # its backend is reached into


def segment(image_s: float) -> Stage:
    """The stage with a stand-in that waits, then fills the boxes."""
    stage: Any = build_stage(StageName.SEGMENT, load_recipe("toy", [f"segment.micro_batch={MICRO_BATCH}"]))
    masks = [np.zeros(SIZE[::-1], bool) for _ in BOXES]
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = True

    def answers(pixels: torch.Tensor, images: Sequence[Any], boxes: Sequence[Sequence[Any]]) -> list[Masks]:
        time.sleep(image_s * len(pixels))
        return [Masks(masks[: len(b)], [0.9] * len(b), [0.9] * len(b)) for b in boxes]

    stage._segment.side = 1024
    stage._segment._answers = answers
    return stage  # type: ignore[no-any-return]  # its backend is reached into


def measured(stages: Sequence[Stage], samples: Sequence[Sample], gpu_ms: float, at_once: int) -> Measurement:
    """The rate of an actor's work on one slice, after one batch to warm up."""
    run_stages(stages, Slice(0, tuple(samples[:MICRO_BATCH])), Ledger(), 600, at_once)
    started, cpu_started = time.perf_counter(), time.process_time()
    run_stages(stages, Slice(0, tuple(samples)), Ledger(), 600, at_once)
    rate = len(samples) / (time.perf_counter() - started)
    cpu_ms = 1000 * (time.process_time() - cpu_started) / len(samples)
    return Measurement("+".join(s.name.value for s in stages), gpu_ms, cpu_ms, at_once, 1000 / gpu_ms, rate)


def report(found: Sequence[Measurement]) -> None:
    headings = ("stages", "batches at once", "CPU, ms/image", "stand-in, images/s", "actor, images/s", "ratio")
    table = Table(*headings, box=None)
    for m in found:
        rates = (f"{m.cpu_ms:.0f}", f"{m.stand_in:.1f}", f"{m.actor:.1f}", f"{m.ratio:.2f}")
        table.add_row(m.stages, str(m.at_once), *rates)
    Console().print(table)
    print(json.dumps([asdict(m) | {"ratio": m.ratio} for m in found]))


if __name__ == "__main__":
    main()
