"""Captioners of transformers: BLIP, BLIP-2, and any other image-to-text model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText, AutoProcessor

from datapipe.backends.loading import ModelSettings, load, load_model
from datapipe.errors import BackendError

CHAT_PROMPT = "Describe the image in one sentence."
"""What a model that chats is asked when the recipe has no prompt."""


class ImageToText:
    """Captions for images, greedily or by beam search.

    A captioner (BLIP, BLIP-2, GIT) continues the prompt, which then begins the caption. A model that chats (its
    processor has a chat template) answers the prompt, and the answer alone is the caption.
    """

    def __init__(self, settings: ModelSettings, prompt: str, max_new_tokens: int, num_beams: int) -> None:
        self._processor: Any = load(settings, AutoProcessor.from_pretrained)
        if not hasattr(self._processor, "image_processor"):
            raise BackendError(f"caption.model {settings.model}: comes without a processor of images and text")
        self._model = load_model(settings, AutoModelForImageTextToText.from_pretrained)
        self._chats = bool(getattr(self._processor, "chat_template", None))
        self._prompt = self._question(prompt or CHAT_PROMPT) if self._chats else prompt
        if self._chats:
            # An answer must follow its own question, not padding.
            self._processor.tokenizer.padding_side = "left"
        self._options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}

    @torch.inference_mode()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[str]:
        """`images`: (H, W, 3) uint8 RGB each. Returns one caption each, white space normalised."""
        text = [self._prompt] * len(images) if self._prompt else None
        inputs = self._processor(images=list(images), text=text, return_tensors="pt", padding=text is not None)
        inputs = inputs.to(self._model.device, self._model.dtype)
        tokens = self._model.generate(**inputs, **self._options)
        if self._chats:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [" ".join(c.split()) for c in self._processor.batch_decode(tokens, skip_special_tokens=True)]

    def _question(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        turns = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
