"""Subject-Diffusion (arXiv 2307.11410) on diffusers: a Stable Diffusion that draws the subjects of reference images.

The paper's parts are `reference`, `prompt` (fused text and image), `adapter`, `location` and `attention_control`;
`unet` lets them into the base, `subject_net` holds what is trained, `diffusion` trains it, `sampling` draws,
and `pipeline` makes, saves and loads what draws.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.diffusion import Losses, SubjectDiffusion, TrainingBatch
    from model.errors import ModelError
    from model.noise import min_snr_weight
    from model.pipeline import SubjectDiffusionPipeline
    from model.prompt import Prompts, PromptTokenizer
    from model.reference import prepare_reference, reference_tensor
    from model.reference_background import ReferenceBackground
    from model.settings import SubjectSettings
    from model.subject import Box, Subject, place
    from model.subject_net import SubjectNet

__all__ = [
    "Box",
    "Losses",
    "ModelError",
    "PromptTokenizer",
    "Prompts",
    "ReferenceBackground",
    "Subject",
    "SubjectDiffusion",
    "SubjectDiffusionPipeline",
    "SubjectNet",
    "SubjectSettings",
    "TrainingBatch",
    "min_snr_weight",
    "place",
    "prepare_reference",
    "reference_tensor",
]

_MODULES = {
    "PromptTokenizer": "prompt",
    "Subject": "subject",
    "SubjectDiffusion": "diffusion",
    "SubjectSettings": "settings",
    "TrainingBatch": "diffusion",
    "place": "subject",
    "reference_tensor": "reference",
    "Box": "subject",
    "Losses": "diffusion",
    "ModelError": "errors",
    "Prompts": "prompt",
    "ReferenceBackground": "reference_background",
    "SubjectDiffusionPipeline": "pipeline",
    "SubjectNet": "subject_net",
    "min_snr_weight": "noise",
    "prepare_reference": "reference",
}


def __getattr__(name: str) -> Any:
    # Importing torch and diffusers takes seconds, which reading a recipe should not cost.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"model.{_MODULES[name]}"), name)
