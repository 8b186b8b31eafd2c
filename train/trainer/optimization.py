"""The optimizer's parts: the weights' moving average, the learning rate's course, and both as tensors on disk."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import ModelError, SubjectNet
from train.trainer.adamw import NarrowAdamW, fresh_state
from train.trainer.checkpoint import load_into
from train.trainer.low_rank import name_without
from train.trainer.parallel import like
from train.trainer.recipe import LrFactors, OptimizerSettings

Named = Mapping[str, nn.Parameter]
"""The trained parameters by name."""


def part_of(name: str) -> str:
    """The part of the subject net that a parameter belongs to, by the names of `LrFactors`."""
    first = name.split(".")[0].removesuffix("_2")
    if first == "blocks":
        return "adapters" if ".adapter." in name else "cross_attention"
    return first


def freeze(net: SubjectNet, factors: LrFactors) -> None:
    """The parts whose learning rate is 0, and what is not read."""
    for name, parameter in net.named_parameters():
        if getattr(factors, part_of(name)) == 0:
            parameter.requires_grad_(False)
    net.freeze_unread()


def adamw(named: Named, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """With a group of parameters for each learning rate, whose `factor` is its share of `lr`."""
    by_factor: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named.items():
        by_factor[getattr(settings.lr_factors, part_of(name))].append(parameter)
    groups: list[dict[str, Any]] = [{"params": params, "factor": factor} for factor, params in by_factor.items()]
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.moments == "float32":
        return torch.optim.AdamW(groups, **options)
    return NarrowAdamW(groups, **options, moments=settings.moments)


def lr_factor(step: int, settings: OptimizerSettings) -> float:
    """The learning rate of a step (0 is the first), as a share of `lr`: a linear rise, then constant or cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


class MovingAverage:
    """w̄ ← d·w̄ + (1 − d)·w after each step n, where d = min(decay, (1 + n) / (10 + n)). Without a decay it is the
    weights themselves."""

    def __init__(self, named: Named, decay: float, on_cpu: bool = False) -> None:
        self._named, self._decay = named, decay
        self.weights: Mapping[str, Tensor] = named
        if decay:
            device = "cpu" if on_cpu else None
            self.weights = {n: p.detach().to(device, copy=True) for n, p in named.items()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        if self._decay:
            decay = min(self._decay, (1 + step) / (10 + step))
            for name, parameter in self._named.items():
                average = self.weights[name]
                average.lerp_(parameter.detach().to(average.device), 1 - decay)


def state_of(
    net: SubjectNet, named: Named, average: MovingAverage, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Weights, frozen ones too, average and AdamW's moments as they are, not copied, by `KINDS` and name."""
    state: dict[str, Tensor] = {f"weights/{name}": p.detach() for name, p in net.named_parameters()}
    if average.weights is not named:
        state |= {f"average/{name}": weights for name, weights in average.weights.items()}
    for name, parameter in named.items():
        state |= {f"optimizer/{name}.{moment}": t for moment, t in optimizer.state.get(parameter, {}).items()}
    return state


@torch.no_grad()
def start_from(weights: Mapping[str, Tensor] | None, net: SubjectNet, average: MovingAverage) -> None:
    """Sets what is trained, and its average, to these weights, which the first rank has. Collective call: every rank
    must make it. Raises ModelError where they do not fit."""
    for name, parameter in net.named_parameters():
        plain = name_without(name)
        if plain is None:
            continue
        if weights is not None and (plain not in weights or weights[plain].shape != parameter.shape):
            was = tuple(weights[plain].shape) if plain in weights else "not there"
            raise ModelError(
                f"init_from: it was trained on another base or with other parts; {plain} is {was}, and "
                f"{tuple(parameter.shape)} is needed"
            )
        parameter.copy_(like(None if weights is None else weights[plain], parameter))
        if name in average.weights:
            average.weights[name].copy_(parameter)


@torch.no_grad()
def restore_state(
    path: Path,
    saved: Collection[str],
    net: SubjectNet,
    named: Named,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Sets everything to what a checkpoint holds. saved: the names of its tensors. Collective call: every rank must
    make it. Raises CheckpointError."""
    moments = optimizer.moments if isinstance(optimizer, NarrowAdamW) else "float32"
    for name, parameter in named.items():
        if f"optimizer/{name}.step" in saved:
            optimizer.state[parameter] = fresh_state(parameter, moments)
    state = state_of(net, named, average, optimizer)
    frozen_until_now = {name for name in state if name.startswith("average/") and name not in saved}
    load_into(path, {name: tensor for name, tensor in state.items() if name not in frozen_until_now})
    for name in frozen_until_now:
        state[name].copy_(state[name.replace("average/", "weights/", 1)])
