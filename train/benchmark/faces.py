"""Faces of people, as FastComposer (Xiao et al. 2023) compares them: found by MTCNN, embedded by InceptionResnetV1."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from datapipe.backends.loading import device_of, refuse_partly_loaded
from subject_diffusion.errors import BackendError, one_line
from train.benchmark.backbones import weights_digest
from train.benchmark.options import BackboneSettings

EMBEDDING = 512
FACE_PX = 160


class Faces:
    """A picture as the embedding of its largest face. facenet-pytorch brings MTCNN's weights along; those of
    InceptionResnetV1 are its `.pt` file, of which nothing is executed."""

    role = "face"

    def __init__(self, settings: BackboneSettings) -> None:
        """Raises BackendError."""
        package: Any = importlib.import_module("facenet_pytorch")
        self._device = device_of(settings)
        self._find = package.MTCNN(image_size=FACE_PX, device=self._device)
        self._embed = package.InceptionResnetV1()
        try:
            state = torch.load(settings.model, map_location="cpu", weights_only=True)
            # The classes that it was trained on are no part of the embedding.
            state = {name: tensor for name, tensor in state.items() if not name.startswith("logits.")}
            missing, unexpected = self._embed.load_state_dict(state, strict=False)
        except Exception as error:  # for bytes that are no checkpoint, torch raises almost any class
            raise BackendError(f"--backbone face={settings.model}: cannot be loaded: {one_line(error)}") from error
        refuse_partly_loaded(settings, missing, (), unexpected)
        self._embed.eval().to(self._device)
        self.weights = weights_digest(self._embed, self._find)

    def identity(self) -> dict[str, Any]:
        """What a result records of it."""
        return {"weights": self.weights, "preprocessing": {"face_px": FACE_PX, "chosen": "largest"}}

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, 512) float32 on the CPU: of length 1, or all zeros where there is no face, whose cosine with any other is
        0."""
        found = torch.zeros(len(pictures), EMBEDDING)
        for number, picture in enumerate(pictures):
            face = self._find(picture.convert("RGB"))
            if face is not None:
                found[number] = self._embed(face[None].to(self._device))[0].cpu()
        return found
