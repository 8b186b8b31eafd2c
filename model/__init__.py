"""Subject-Diffusion (arXiv 2307.11410) on diffusers: a Stable Diffusion that draws the subjects of reference images."""

from model.diffusion import Losses, SubjectDiffusion, TrainingBatch
from model.errors import ModelError
from model.prompt import Prompts, PromptTokenizer
from model.settings import SubjectSettings
from model.subject_net import SubjectNet

__all__ = [
    "Losses",
    "ModelError",
    "PromptTokenizer",
    "Prompts",
    "SubjectDiffusion",
    "SubjectNet",
    "SubjectSettings",
    "TrainingBatch",
]
