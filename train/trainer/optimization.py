"""The optimizer's parts: the weights' moving average, the learning rate's course, and both as tensors on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model import ModelError
from train.trainer.parallel import gathered_by_name, like, of_first_rank
from train.trainer.recipe import OptimizerSettings

Named = Mapping[str, nn.Parameter]
"""The trained parameters by name."""


def adamw(named: Named, settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(named.values(), settings.lr, settings.betas, weight_decay=settings.weight_decay)


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

    def __init__(self, named: Named, decay: float) -> None:
        self._named, self._decay = named, decay
        self.weights: Mapping[str, Tensor] = {n: p.detach().clone() for n, p in named.items()} if decay else named

    @torch.no_grad()
    def follow(self, step: int) -> None:
        if self._decay:
            decay = min(self._decay, (1 + step) / (10 + step))
            for name, parameter in self._named.items():
                self.weights[name].lerp_(parameter.detach(), 1 - decay)


def gathered_state(named: Named, average: MovingAverage, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Weights, average and AdamW's moments, whole and on the CPU: file's stem -> name -> tensor. Collective call: every
    rank must make it."""
    moments = {
        f"{n}.{moment}": optimizer.state[p][moment]
        for n, p in named.items()
        for moment in ("exp_avg", "exp_avg_sq", "step")
        if p in optimizer.state
    }
    return {
        "weights": gathered_by_name(named.items()),
        "average": {} if average.weights is named else gathered_by_name(average.weights.items()),
        "optimizer": gathered_by_name(moments.items()),
    }


@torch.no_grad()
def start_from(weights: Mapping[str, Tensor] | None, named: Named, average: MovingAverage) -> None:
    """Sets what is trained, and its average, to these weights, which the first rank has. Collective call: every rank
    must make it. Raises ModelError where they do not fit."""
    for name, parameter in named.items():
        if weights is not None and (name not in weights or weights[name].shape != parameter.shape):
            was = tuple(weights[name].shape) if name in weights else "not there"
            raise ModelError(
                f"init_from: it was trained on another base or with other parts; {name} is {was}, and "
                f"{tuple(parameter.shape)} is needed"
            )
        parameter.copy_(like(None if weights is None else weights[name], parameter))
        if average.weights is not named:
            average.weights[name].copy_(parameter)


@torch.no_grad()
def restore_state(
    tensors: Mapping[str, Mapping[str, Tensor]] | None,
    named: Named,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Inverse of `gathered_state`, in place. tensors: the first rank's; the others have none, and are sent what is
    theirs. Collective call: every rank must make it."""

    def of(stem: str, name: str) -> Tensor | None:
        return None if tensors is None else tensors[stem][name]

    for name, parameter in named.items():
        parameter.copy_(like(of("weights", name), parameter))
        if average.weights is not named:
            average.weights[name].copy_(like(of("average", name), parameter))
    moments = None if tensors is None else tensors["optimizer"]
    steps = of_first_rank(
        None if moments is None else {n: moments[f"{n}.step"] for n in named if f"{n}.step" in moments}
    )
    state = {
        i: {
            "step": steps[n],
            "exp_avg": like(of("optimizer", f"{n}.exp_avg"), p),
            "exp_avg_sq": like(of("optimizer", f"{n}.exp_avg_sq"), p),
        }
        for i, (n, p) in enumerate(named.items())
        if n in steps
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
