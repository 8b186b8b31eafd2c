"""AdamW with moments in bfloat16: 4 bytes for each parameter in place of 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_EPS = 1e-8


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), computed in float32; only what is kept from one step to the next
    is bfloat16. The draws of its rounding follow from the step alone: processes that train alike stay alike, and a run
    that goes on learns what an undisturbed one does."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no closure is called
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(int(state["step"]))
                _update(_here(parameter), _here(parameter.grad), state, group, generators[device])


def _update(
    weights: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], generator: torch.Generator
) -> None:
    (beta, beta_sq), lr, step = group["betas"], group["lr"], state["step"].item()
    exp_avg, exp_avg_sq = _here(state["exp_avg"]), _here(state["exp_avg_sq"])
    mean = exp_avg.float().lerp_(gradient, 1 - beta)
    square = exp_avg_sq.float().mul_(beta_sq).addcmul_(gradient, gradient, value=1 - beta_sq)
    weights.mul_(1 - lr * group["weight_decay"])
    scale = (square / (1 - beta_sq**step)).sqrt_().add_(_EPS)
    weights.addcdiv_(mean, scale, value=-lr / (1 - beta**step))
    exp_avg.copy_(stochastically_rounded(mean, generator))
    exp_avg_sq.copy_(stochastically_rounded(square, generator))


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """values: finite float32. Returns bfloat16, one of the two neighbors of each value, drawn so that their mean is the
    value: adds 16 random bits below those that are kept, and cuts them off. Rounded to the nearest, a moment that
    decays by a thousandth at a step would never move."""
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    kept = (values.view(torch.int32) + noise) & ~0xFFFF
    return kept.view(torch.float32).to(torch.bfloat16)


def _here(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
