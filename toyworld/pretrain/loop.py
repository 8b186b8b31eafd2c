"""One training loop for all toy models: seeded, resumable at the exact step, with an average of the weights.

Under `torchrun` its processes train one model together, each on batches of its own.
"""

from __future__ import annotations

import atexit
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments would keep a process group for good
from torch import Tensor, nn

from subject_diffusion.storage import whole_file

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train."""

    steps: int
    lr: float
    """Peak learning rate of AdamW: linear warm-up, then half a cosine down to 2 % of it."""
    warmup: int = 200
    """Steps of the linear warm-up."""
    weight_decay: float = 0.02
    """On matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.998
    """Decay of the averaged weights per step; lower in the first steps: min(ema, (1 + step) / (10 + step))."""
    seed: int = 0
    checkpoint_s: float = 180.0
    """Seconds between checkpoints."""
    log_every: int = 50
    """Steps between progress lines."""


def train(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    loss_fn: Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]],
    settings: LoopSettings,
    folder: Path,
    at_checkpoint: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Trains `model` in place and returns a copy that holds the averaged weights.

    `batch_at(step)` must depend on nothing but the step; `loss_fn` gives the loss and what else is worth a number in
    the progress line. The random draws inside a step (dropout) are keyed by (seed, step), so a run that was interrupted
    and called again with the same `folder` ends at the very same weights. `at_checkpoint(averaged, step)` is called, in
    eval mode, after every checkpoint and at the end. Of several processes, the first alone saves, tells and calls it.
    """
    rank, world = _place()
    folder.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = _adamw(model, settings)
    start, spent_s = _resume(folder / "checkpoint.pt", model, average, optimizer)
    began = saved = time.monotonic()
    sums: dict[str, float] = {}
    model.train()
    for step in range(start, settings.steps):
        torch.manual_seed(settings.seed * 1_000_003 + step * world + rank)
        loss, measures = loss_fn(model, batch_at(step * world + rank))
        norm = _learn(model, optimizer, loss, step, settings, world)
        _follow(average, model, min(settings.ema, (1 + step) / (10 + step)))

        for name, value in {"loss": loss, "norm": norm, **measures}.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        done = step + 1
        if rank > 0:
            continue
        if done % settings.log_every == 0:
            _tell(done, start, settings, time.monotonic() - began, sums)
            sums.clear()
        if time.monotonic() - saved > settings.checkpoint_s or done == settings.steps:
            _save(folder / "checkpoint.pt", model, average, optimizer, done, spent_s + time.monotonic() - began)
            if at_checkpoint is not None:
                at_checkpoint(average, done)
            saved = time.monotonic()
    return average


def _learn(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, step: int, settings: LoopSettings, world: int
) -> Tensor:
    """One step of the optimizer; returns the norm of the gradient. Raises FloatingPointError for a loss that is not
    finite."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"loss is {loss.item()} at step {step}")
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    if world > 1:
        _average_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    optimizer.step()
    return norm


def _tell(done: int, start: int, settings: LoopSettings, seconds: float, sums: dict[str, float]) -> None:
    """Prints the progress line. `start`, `seconds`: of this call; `sums`: over the steps since the last line."""
    pace = (done - start) / seconds
    window = min(settings.log_every, done - start)
    numbers = " ".join(f"{name} {total / window:.3f}" for name, total in sums.items())
    left = (settings.steps - done) / pace / 60
    print(f"step {done}/{settings.steps} {pace:.2f} steps/s {left:.1f} min left {numbers}", flush=True)


def fast_precision() -> torch.autocast:
    """Autocast to bfloat16 on CPUs that multiply it in hardware; elsewhere none: there it is 80 times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.cpu.get_capabilities().get("avx512_bf16")))


def _place() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 unless torchrun started it."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)  # a thread of it that outlives the interpreter aborts the process
    return dist.get_rank(), dist.get_world_size()


def _average_gradients(model: nn.Module) -> None:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def processes() -> int:
    """How many train together."""
    return _place()[1]


def is_first_process() -> bool:
    """Whether this process is the one that saves, of those that train together."""
    return _place()[0] == 0


def seconds_spent(folder: Path) -> float:
    """Wall-clock seconds of training behind the checkpoint in `folder`, all interrupted parts together."""
    return float(torch.load(folder / "checkpoint.pt", weights_only=True)["spent_s"])


def learning_rate(step: int, settings: LoopSettings) -> float:
    """Linear from 0 to lr over `warmup` steps, then lr * (0.02 + 0.98 * (1 + cos(pi * t)) / 2)."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _adamw(model: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in free if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in free if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), foreach=True)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for slow, fast in zip(average.buffers(), model.buffers(), strict=True):
        slow.copy_(fast)


def _save(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int, spent_s: float
) -> None:
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "spent_s": spent_s,
    }
    with whole_file(path) as file:
        torch.save(state, file)


def _resume(path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Step to begin with, and seconds spent before; loads the checkpoint into the three if there is one."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["spent_s"])
