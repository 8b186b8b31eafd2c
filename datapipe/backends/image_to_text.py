"""Captioners of transformers: BLIP, BLIP-2, and any other image-to-text model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText, AutoProcessor

from datapipe.backends.loading import ModelSettings, load, load_model


class ImageToText:
    """Captions for images, greedily or by beam search."""

    def __init__(self, settings: ModelSettings, prompt: str, max_new_tokens: int, num_beams: int) -> None:
        self._processor = load(settings, AutoProcessor.from_pretrained)
        self._model = load_model(settings, AutoModelForImageTextToText.from_pretrained)
        self._prompt = prompt
        self._options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}

    @torch.inference_mode()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[str]:
        """`images`: (H, W, 3) uint8 RGB each. Returns one caption each, white space normalised."""
        text = [self._prompt] * len(images) if self._prompt else None
        inputs = self._processor(images=list(images), text=text, return_tensors="pt", padding=text is not None)
        inputs = inputs.to(self._model.device, self._model.dtype)
        tokens = self._model.generate(**inputs, **self._options)
        return [" ".join(c.split()) for c in self._processor.batch_decode(tokens, skip_special_tokens=True)]
