"""The layers that the subject net trains in place of the base's: how it moves to another base, and takes a LoRA of its
own along."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from model.errors import ModelError
from model.unet import transformer_blocks

_ROUNDING = 0.005
"""Relative; bfloat16's is 0.002."""


def base_layers(unet: Any, text_encoder: Any | None, text_encoder_2: Any | None = None) -> dict[str, Any]:
    """Those layers of the base, by the names of their counterparts in the subject net."""
    layers = {"conv_in": unet.conv_in}
    for i, block in enumerate(transformer_blocks(unet)):
        layers |= {f"blocks.{i}.to_k": block.attn2.to_k, f"blocks.{i}.to_v": block.attn2.to_v}
    for prefix, encoder in (("text_encoder", text_encoder), ("text_encoder_2", text_encoder_2)):
        if encoder is not None:
            layers |= {f"{prefix}.{name}": layer for name, layer in encoder.named_modules() if name}
    return layers


def sampled_weights(layers: Mapping[str, Any]) -> dict[str, float]:
    """The first weight of each matrix and convolution, by which a base is known in any precision. Those that are
    quantized or not loaded are left out."""
    weights = {name: layer.weight for name, layer in layers.items() if _readable(getattr(layer, "weight", None))}
    return {name: float(f"{w.flatten()[0].item():.5g}") for name, w in weights.items()}


def of_another_base(layers: Mapping[str, Any], trained_on: Mapping[str, float]) -> bool:
    """Whether these layers are not those of `trained_on`, which `sampled_weights` gave in training."""
    found = sampled_weights(layers)
    return any(abs(found[n] - w) > _ROUNDING * abs(w) + 1e-6 for n, w in trained_on.items() if n in found)


@torch.no_grad()
def move(net: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """W ← W + (W_after − W_before) for each layer of the net: what was learned on one base is added to another one.
    before, after: `base_layers` of both. Raises ModelError where these are not alike."""
    if _shapes(before) != _shapes(after):
        raise ModelError("subject net: it was trained on a base of other layers, or one of the two has a LoRA loaded")
    for name, layer in after.items():
        own = net.get_submodule(name)
        for key, now in layer.named_parameters(recurse=False):
            weights, was = getattr(own, key), getattr(before[name], key)
            shared = weights[tuple(slice(side) for side in now.shape)]  # without the location's channel
            shared.copy_(shared.float() + (now.float().to(shared.device) - was.float().to(shared.device)))


def copy_lora(net: Any, layers: Mapping[str, Any], adapter: str) -> None:
    """Loads into the net, under the same name, what a LoRA that the base has loaded does to these layers of it; but for
    the first convolution, which has another input here."""
    state: dict[str, Tensor] = {}
    alphas = {}
    for name, layer in layers.items():
        if adapter in getattr(layer, "lora_A", ()) and name != "conv_in":
            for matrix in ("lora_A", "lora_B"):
                state[f"net.{name}.{matrix}.weight"] = getattr(layer, matrix)[adapter].weight.detach()
            alphas[f"net.{name}.alpha"] = layer.scaling[adapter] * layer.r[adapter]
    if adapter in getattr(net, "peft_config", ()):
        net.delete_adapters(adapter)
    if state:
        net.load_lora_adapter(state, prefix="net", network_alphas=alphas, adapter_name=adapter)


@contextlib.contextmanager
def lora_scaled(parts: Sequence[Any], scale: float) -> Iterator[None]:
    """Around what these compute, with their LoRAs at so much of their strength."""
    loaded = [part for part in parts if scale != 1 and getattr(part, "peft_config", None)]
    for part in loaded:
        scale_lora_layers(part, scale)
    try:
        yield
    finally:
        for part in loaded:
            unscale_lora_layers(part, scale)


def _readable(weights: Any) -> bool:
    plain = type(weights) in (Tensor, nn.Parameter)  # quantizers have classes, or types of numbers, of their own
    return plain and weights.ndim > 1 and weights.is_floating_point() and weights.device.type != "meta"


def _shapes(layers: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [tuple(p.shape) for p in layer.parameters(recurse=False)] for name, layer in layers.items()}
