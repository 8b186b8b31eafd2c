"""The optimizer's parts: the weights' moving average, the learning rate's course, and both as tensors on disk."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model import ModelError, SubjectNet
from train.trainer.adamw import NarrowAdamW
from train.trainer.parallel import gathered_by_name, like, of_first_rank
from train.trainer.recipe import LrFactors, OptimizerSettings

Named = Mapping[str, nn.Parameter]
"""The trained parameters by name."""


def part_of(name: str) -> str:
    """The part of the subject net that a parameter belongs to, by the names of `LrFactors`."""
    first = name.split(".")[0]
    if first == "blocks":
        return "adapters" if ".adapter." in name else "cross_attention"
    return first


def freeze(net: SubjectNet, factors: LrFactors) -> None:
    """The parts whose learning rate is 0."""
    for name, parameter in net.named_parameters():
        if getattr(factors, part_of(name)) == 0:
            parameter.requires_grad_(False)


def adamw(named: Named, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """With a group of parameters for each learning rate, whose `factor` is its share of `lr`."""
    by_factor: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named.items():
        by_factor[getattr(settings.lr_factors, part_of(name))].append(parameter)
    groups: list[dict[str, Any]] = [{"params": params, "factor": factor} for factor, params in by_factor.items()]
    kind = torch.optim.AdamW if settings.moments == "float32" else NarrowAdamW
    return kind(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


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


def gathered_state(
    net: SubjectNet, named: Named, average: MovingAverage, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """Weights, frozen ones too, average and AdamW's moments, whole, on the first rank's CPU: file's stem -> name ->
    tensor. Collective call: every rank must make it."""
    moments = {
        f"{n}.{moment}": optimizer.state[p][moment]
        for n, p in named.items()
        for moment in ("exp_avg", "exp_avg_sq", "step")
        if p in optimizer.state
    }
    return {
        "weights": gathered_by_name(net.named_parameters()),
        "average": {} if average.weights is named else gathered_by_name(average.weights.items()),
        "optimizer": gathered_by_name(moments.items()),
    }


@torch.no_grad()
def start_from(weights: Mapping[str, Tensor] | None, net: SubjectNet, average: MovingAverage) -> None:
    """Sets what is trained, and its average, to these weights, which the first rank has. Collective call: every rank
    must make it. Raises ModelError where they do not fit."""
    for name, parameter in net.named_parameters():
        if weights is not None and (name not in weights or weights[name].shape != parameter.shape):
            was = tuple(weights[name].shape) if name in weights else "not there"
            raise ModelError(
                f"init_from: it was trained on another base or with other parts; {name} is {was}, and "
                f"{tuple(parameter.shape)} is needed"
            )
        parameter.copy_(like(None if weights is None else weights[name], parameter))
        if name in average.weights:
            average.weights[name].copy_(parameter)


@torch.no_grad()
def restore_state(
    tensors: Mapping[str, Mapping[str, Tensor]] | None,
    net: SubjectNet,
    named: Named,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Inverse of `gathered_state`, in place. tensors: the first rank's; the others have none, and are sent what is
    theirs. Collective call: every rank must make it."""

    def of(stem: str, name: str) -> Tensor | None:
        return None if tensors is None else tensors[stem][name]

    for name, parameter in net.named_parameters():
        parameter.copy_(like(of("weights", name), parameter))
    if average.weights is not named:
        for name, averaged in average.weights.items():
            has = tensors is None or name in tensors["average"]  # not where it was frozen until now
            averaged.copy_(like(of("average" if has else "weights", name), named[name]))
    moments = None if tensors is None else tensors["optimizer"]
    steps = of_first_rank(
        None if moments is None else {n: moments[f"{n}.step"] for n in named if f"{n}.step" in moments}
    )
    dtype = torch.bfloat16 if isinstance(optimizer, NarrowAdamW) else torch.float32
    for name in steps:
        parameter = named[name]
        example = torch.empty_like(parameter, dtype=dtype)
        optimizer.state[parameter] = {
            "step": steps[name].clone(),
            "exp_avg": like(of("optimizer", f"{name}.exp_avg"), example),
            "exp_avg_sq": like(of("optimizer", f"{name}.exp_avg_sq"), example),
        }
