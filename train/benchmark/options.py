"""What a user chooses of a benchmark, checked before anything that takes seconds is imported."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from datapipe.backends.loading import ModelSettings, check_model
from subject_diffusion.errors import BackendError, RunError
from subject_diffusion.settings import Settings

KINDS = {
    "dino": {"vit": "ViTModel"},
    "dinov2": {"dinov2": "Dinov2Model"},
    "clip": {"clip": "CLIPModel"},
    "siglip2": {"siglip2": "Siglip2Model", "siglip2_vision_model": "Siglip2VisionModel"},
}
"""By role, the `model_type` that can play it, and its class in transformers."""

FACE = "face"
"""The role of InceptionResnetV1, a file of facenet-pytorch."""


class BackboneSettings(ModelSettings):
    """A backbone, as `--backbone ROLE=MODEL` names it."""

    key: ClassVar[str] = "--backbone"


class Sampler(Settings):
    """How pictures are drawn. Defaults: the paper's."""

    num_inference_steps: int = Field(50, ge=1)
    """Steps of the base's scheduler."""
    guidance_scale: float = Field(7.5, ge=1)
    """Text guidance."""
    subject_guidance_scale: float = Field(1.5, ge=1)
    """Subject guidance."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """Share by which guidance's contrast is brought back (Lin et al. 2024: 0.7)."""
    height: int | None = Field(None, ge=1)
    """Pixels; default: the base's own."""
    width: int | None = Field(None, ge=1)
    """Pixels; default: the base's own."""


@dataclass(frozen=True)
class Drawing:
    """How a model draws a benchmark's pictures."""

    model: Path
    """As for `open_pipeline`."""
    sampler: Sampler
    seed: int


@dataclass(frozen=True)
class Share:
    """The part of the pictures that one process draws: every `of`-th batch, from the `number`-th on, 1 being the
    first."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """From a text such as 2/4. Raises RunError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise RunError(f"--shard {text}: write which of how many, such as 1/4 to 4/4")
        return cls(int(found[1]), int(found[2]))


def parse_backbones(given: Sequence[str], masks: bool) -> dict[str, BackboneSettings]:
    """By role, each there, or on the hub, and of the right kind. given: ROLE=MODEL; masks: whether subjects will be cut
    out. Raises SddError."""
    found: dict[str, BackboneSettings] = {}
    for text in given:
        role, _, name = text.partition("=")
        if role not in (*KINDS, FACE) or not name:
            raise RunError(f"--backbone {text}: write ROLE=MODEL, with one of {', '.join(KINDS)}, {FACE}")
        if role in found:
            raise RunError(f"--backbone {text}: there is a {role} already; another one makes a result of its own")
        if role == "siglip2" and not masks:
            raise RunError("--backbone siglip2 compares inside masks: name what finds them, as in --labels modern")
        found[role] = BackboneSettings(model=name)
        if role == FACE:
            _check_face(name)
        else:
            check_model(found[role], tuple(KINDS[role]), processor=True, tokenizer=role == "clip")
    return found


def _check_face(file: str) -> None:
    if importlib.util.find_spec("facenet_pytorch") is None:
        raise BackendError(
            "facenet_pytorch is not installed; pip install --no-deps facenet-pytorch==2.6.0 brings it, whose "
            "requirements are of older versions than it needs"
        )
    if not Path(file).is_file():
        raise BackendError(f"--backbone face={file}: no such file; it is facenet-pytorch's 20180402-114759-vggface2.pt")
