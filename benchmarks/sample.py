"""What subjects cost in sampling: `python benchmarks/sample.py [--px 192] [--device cuda]`.

Draws with one to four subjects and without, and with the base model alone, in turns in one run: time and peak memory as
ratios to the base's. Then, what each measure saves: the time without it over the time with it. The toy weights, with an
untrained subject net on them, which costs what a trained one does. On a CPU, time is the process's CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from model import Subject, SubjectDiffusion, SubjectDiffusionPipeline, SubjectSettings
from model.adapter import TokenRun
from model.conditions import Conditions, condition
from model.guidance import guide
from model.subject_net import SubjectNet
from model.unet import BlockKeys

WEIGHTS = Path(__file__).parents[1] / "toyworld/weights"
TAGS = ["mug", "fish", "robot", "teapot"]
PROMPT = "a mug and a fish and a robot and a teapot on grass"
SUBJECTS = [
    Subject(Image.open(WEIGHTS.parents[1] / f"examples/references/{tag}.png"), tag, box=(k / 4, 0.3, (k + 1) / 4, 0.8))
    for k, tag in enumerate(TAGS)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=192, help="side of the images; 192 px have 48 x 48 latent pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is taken")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    pipe, base = pipelines(arguments.device)
    options = {
        "height": arguments.px,
        "width": arguments.px,
        "num_inference_steps": arguments.steps,
        "output_type": "latent",
    }

    def draw(count: int, **scales: float) -> Callable[[], Any]:
        return lambda: pipe(PROMPT, SUBJECTS[:count], **options, **scales)

    drawn: dict[str, Callable[[], Any]] = {"base": lambda: base(PROMPT, **options)}
    drawn |= {f"{count} subjects": draw(count) for count in range(5)}
    measures = {
        "absent slots left out": (draw(1), every_slot),
        "keys and values computed once": (draw(4), keys_at_every_step),
        "branches in one batch": (draw(4), branches_one_by_one),
        "no branch of no weight": (draw(4, subject_guidance_scale=7.5), every_branch),
    }
    for name, (with_it, without) in measures.items():
        drawn[f"with {name}"] = with_it
        drawn[f"without {name}"] = under(without, with_it)
    seconds = timed(drawn, arguments.rounds, arguments.device)
    memory = {name: peak(drawn[name], arguments.device) for name in list(drawn)[:6]}
    found = {
        "time_over_base": {name: seconds[name] / seconds["base"] for name in memory},
        "memory_over_base": {name: memory[name] / memory["base"] for name in memory},
        "further_subject": [seconds[f"{n + 1} subjects"] / seconds[f"{n} subjects"] - 1 for n in range(1, 4)],
        "saving": {name: seconds[f"without {name}"] / seconds[f"with {name}"] for name in measures},
    }
    show(found)
    print(json.dumps(found))


def pipelines(device: str) -> tuple[Any, Any]:
    """The subject model and its base alone."""
    settings = SubjectSettings(max_subjects=4, attention_downsampling=(1, 2))
    model = SubjectDiffusion.from_base(WEIGHTS / "stable-diffusion", settings, WEIGHTS / "clip")
    base = StableDiffusionPipeline.from_pretrained(WEIGHTS / "stable-diffusion", dtype=torch.float32)
    pipe = SubjectDiffusionPipeline.from_model(model)
    for made in (pipe, base):
        made.to(device).set_progress_bar_config(disable=True)
    return pipe, base


def under(patches: Callable[[], contextlib.AbstractContextManager[Any]], draw: Callable[[], Any]) -> Callable[[], Any]:
    def patched() -> None:
        with patches():
            draw()

    return patched


def every_slot() -> Any:
    return mock.patch("model.conditions.pack_tokens", lambda tokens, *_: [TokenRun(tokens)])


class _AtEveryStep(Sequence[BlockKeys]):
    """Computes a block's keys and values whenever they are read."""

    def __init__(self, net: SubjectNet, text: torch.Tensor, tokens: Sequence[TokenRun]) -> None:
        self.net, self.given = net, (text, tokens)

    def __getitem__(self, index: Any) -> Any:
        blocks: Any = self.net.blocks
        return blocks[index].keys(*self.given)

    def __len__(self) -> int:
        return len(self.net.blocks)


def keys_at_every_step() -> Any:
    return mock.patch.object(SubjectNet, "keys", lambda net, text, tokens: _AtEveryStep(net, text, tokens))


def every_branch() -> Any:
    return mock.patch("model.conditions.needed_branches", return_value=["full", "image", "nothing"])


@contextlib.contextmanager
def branches_one_by_one() -> Iterator[None]:
    def apart(*inputs: Any, **scales: Any) -> list[Conditions]:
        made = []
        for branch in ("full", "image", "nothing"):
            with mock.patch("model.conditions.needed_branches", lambda *_, branch=branch: [branch]):
                made.append(condition(*inputs, **scales))
        return made

    def predict(
        net: SubjectNet, unet: Any, sample: Any, t: Any, conditions: list[Conditions], text_scale: float, *_: Any
    ) -> Any:
        full, image, nothing = (net.denoise_step(unet, sample, t, c.keys, c.location, c.cells) for c in conditions)
        return guide(full, image, nothing, text_scale, conditions[0].subject_scale), full

    with (
        mock.patch("model.sampling.condition", apart),
        mock.patch("model.sampling.subject_prediction", predict),
    ):
        yield


def timed(drawn: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each, taken in turns, so that what else the machine does falls on all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in drawn}
    for _ in range(rounds + 1):
        for name, draw in drawn.items():
            started = _now(device)
            draw()
            seconds[name].append(_now(device) - started)
    return {name: median(taken[1:]) for name, taken in seconds.items()}


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak(draw: Callable[[], Any], device: str) -> float:
    """Bytes that a call holds at most beyond the weights."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        draw()
        return float(torch.cuda.max_memory_allocated() - held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        draw()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return float(most)


def show(found: dict[str, Any]) -> None:
    table = Table("over the base alone", "time", "memory", box=None)
    for name, share in found["time_over_base"].items():
        table.add_row(name, f"{share:.2f}", f"{found['memory_over_base'][name]:.2f}")
    console = Console(stderr=True)
    console.print(table)
    console.print("each further subject:", ", ".join(f"{share:+.1%}" for share in found["further_subject"]))
    for name, share in found["saving"].items():
        console.print(f"{name}: {share:.2f} times as fast")


if __name__ == "__main__":
    main()
