"""What one step of sampling predicts, guided, by the subject model or by the base alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.conditions import Conditions
from model.guidance import Branch, guide
from model.prompt import EncodedText
from model.subject_net import SubjectNet

Prediction = tuple[Tensor, Tensor]
"""The guided prediction, and the full branch's own, (N, C, h, w) each."""


def blended(found: Sequence[Prediction], share: float) -> Prediction:
    """Of the subject model's and the base's predictions, (1 − share)·s + share·b; or the one that was needed."""
    if len(found) == 1:
        return found[0]
    guided, full = (torch.lerp(subject, base, share) for subject, base in zip(*found, strict=True))
    return guided, full


def subject_prediction(
    net: SubjectNet,
    unet: Any,
    sample: Tensor,
    t: Tensor,
    conditions: Conditions,
    text_scale: float,
    adapter_scale: float,
    attention: dict[str, Any] | None,
) -> Prediction:
    """sample: (N, C, h, w) at timestep `t`; text_scale: s_t of `guide`; adapter_scale: β; attention:
    `cross_attention_kwargs`."""
    branches = conditions.branches
    samples = torch.cat([sample] * len(branches))
    prediction = net.denoise_step(
        unet,
        samples,
        t,
        conditions.keys,
        conditions.location,
        conditions.cells,
        adapter_scale,
        attention,
        conditions.added,
    )
    found: dict[Branch, Tensor] = dict(zip(branches, prediction.chunk(len(branches)), strict=True))
    full = found["full"]
    # A branch without weight was not computed: any other stands in.
    image = found["image"] if "image" in found else found.get("nothing", full)
    nothing = found.get("nothing", image)
    return guide(full, image, nothing, text_scale, conditions.subject_scale.to(full.dtype)), full


def base_prediction(
    unet: Any,
    sample: Tensor,
    t: Tensor,
    text: EncodedText,
    time_ids: Tensor,
    text_scale: float,
    attention: dict[str, Any] | None,
) -> Prediction:
    """As `subject_prediction`, by classifier-free guidance alone. text: 2·N, without and with the prompt; time_ids:
    (6,) of `EncodedText.added`."""
    added = text.added(time_ids.expand(len(text.states), -1))
    kwargs = {"encoder_hidden_states": text.states, "cross_attention_kwargs": attention, "added_cond_kwargs": added}
    prediction = unet(torch.cat([sample] * 2), t, **kwargs, return_dict=False)[0]
    nothing, full = prediction.chunk(2)
    return nothing + text_scale * (full - nothing), full
