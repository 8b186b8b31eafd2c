"""A LoRA of each text encoder (Hu et al. 2021, with peft): W + B·A in place of a new W, in its attentions alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from model import SubjectNet

_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
_WHOLE, _DOWN, _UP = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def add_low_rank(net: SubjectNet, rank: int) -> None:
    """The text encoders' own weights stay as they are; A is random, and B zero, at first."""
    from peft import LoraConfig, inject_adapter_in_model  # sampling does without it

    for text_encoder in net.text_encoders:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=_LAYERS), text_encoder)


def name_without(name: str) -> str | None:
    """What a parameter of a net with a LoRA is called in one without; None for the LoRA's own."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a net with a LoRA, or of one without, as those of one without."""
    whole = {}
    for name, tensor in weights.items():
        plain = name_without(name)
        if plain is not None:
            layer = name.removesuffix(_WHOLE)
            low_rank = weights[f"{layer}{_UP}"] @ weights[f"{layer}{_DOWN}"] if layer != name else 0
            whole[plain] = tensor + low_rank
    return whole
