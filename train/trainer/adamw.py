"""AdamW with narrow moments: 4 or 2 bytes for each parameter in place of 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Moments = Literal["float32", "bfloat16", "float8"]

_EPS = 1e-8
_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = 448.0


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), computed in float32; only what is kept from one step to the next
    is narrow. The draws of its rounding follow from the step alone: processes that train alike stay alike, and a run
    that goes on learns what an undisturbed one does."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        moments: Moments = "bfloat16",
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no closure is called
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(fresh_state(parameter, self.moments))
                state["step"] += 1
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(int(state["step"]))
                _update(_here(parameter), _here(parameter.grad), state, group, generators[device])


def fresh_state(parameter: Tensor, moments: Moments) -> dict[str, Tensor]:
    """What is kept of a parameter, before its first step: `step`, and `exp_avg` and `exp_avg_sq`, split as it is. In
    float8 these are shares of 448 of a row's greatest value, `exp_avg_scale` and `exp_avg_sq_scale`; and of the square
    it is the root, whose range is half as wide."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": _FLOAT8}[moments]
    state = {"step": torch.tensor(0.0)}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(parameter, dtype=dtype)
        if moments == "float8":
            state[f"{name}_scale"] = _zero_for_each_row(parameter)
    return state


def _update(
    weights: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], generator: torch.Generator
) -> None:
    (beta, beta_sq), lr, step = group["betas"], group["lr"], state["step"].item()
    mean = _read(state, "exp_avg").lerp_(gradient, 1 - beta)
    square = _read(state, "exp_avg_sq").mul_(beta_sq).addcmul_(gradient, gradient, value=1 - beta_sq)
    weights.mul_(1 - lr * group["weight_decay"])
    scale = (square / (1 - beta_sq**step)).sqrt_().add_(_EPS)
    weights.addcdiv_(mean, scale, value=-lr / (1 - beta**step))
    _write(state, "exp_avg", mean, generator)
    _write(state, "exp_avg_sq", square, generator)


def _read(state: dict[str, Tensor], name: str) -> Tensor:
    kept = _here(state[name]).float()
    if f"{name}_scale" not in state:
        return kept
    kept *= _by_row(_here(state[f"{name}_scale"]), kept)
    return kept.square_() if name == "exp_avg_sq" else kept


def _write(state: dict[str, Tensor], name: str, values: Tensor, generator: torch.Generator) -> None:
    if f"{name}_scale" not in state:
        _here(state[name]).copy_(stochastically_rounded(values, generator))
        return
    narrow, scale = stochastically_float8(values.sqrt() if name == "exp_avg_sq" else values, generator)
    if name == "exp_avg_sq":  # none becomes 0, by which the mean would be divided
        least = torch.tensor(2.0**-9, device=values.device)
        narrow = torch.where(values > 0, narrow.float().maximum(least), 0).to(_FLOAT8)
    _here(state[name]).copy_(narrow)
    _here(state[f"{name}_scale"]).copy_(scale)


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """values: finite float32. Returns bfloat16, one of the two neighbors of each value, drawn so that their mean is the
    value: adds 16 random bits below those that are kept, and cuts them off. Rounded to the nearest, a moment that
    decays by a thousandth at a step would never move."""
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    kept = (values.view(torch.int32) + noise) & ~0xFFFF
    return kept.view(torch.float32).to(torch.bfloat16)


def stochastically_float8(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Likewise as float8 (e4m3: a sign, 4 bits of exponent, 3 of mantissa). values: (R, ...) finite float32. Returns
    (R, ...) float8 and the scale of each row (R,) float32, by which it is to be multiplied."""
    rows = values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)
    scale = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _FLOAT8_MAX
    scaled = values / _by_row(scale, values)
    exponent = torch.frexp(scaled.abs().clamp(min=2.0**-6)).exponent
    spacing = torch.exp2(exponent.float() - 4)
    noise = torch.rand(values.shape, generator=generator, device=values.device)
    rounded = torch.floor(scaled / spacing + noise) * spacing
    return rounded.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(_FLOAT8), scale


def _by_row(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.ndim - 1))


def _zero_for_each_row(parameter: Tensor) -> Tensor:
    """(R,) float32 for a parameter (R, ...)."""
    here = _here(parameter)
    zeros = torch.zeros(len(here), device=here.device)
    if not isinstance(parameter, DTensor):
        return zeros
    rows = parameter.shape[:1]
    return DTensor.from_local(zeros, parameter.device_mesh, parameter.placements, shape=rows, stride=(1,))


def _here(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
