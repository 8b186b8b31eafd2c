"""Subject-Diffusion (arXiv 2307.11410) on diffusers: a Stable Diffusion that draws the subjects of reference images.

The paper's parts are `reference`, `prompt` (fused text and image), `adapter`, `location` and `attention_control`;
`unet` lets them into the base, `subject_net` holds what is trained, `diffusion` trains it, `pipeline` samples.
"""

from model.diffusion import Losses, SubjectDiffusion, TrainingBatch
from model.errors import ModelError
from model.noise import min_snr_weight
from model.pipeline import SubjectDiffusionPipeline
from model.prompt import Prompts, PromptTokenizer
from model.reference import ReferenceBackground, prepare_reference, reference_tensor
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
