"""The captioners in transformers: BLIP, BLIP-2, and any other image-to-text model, chat models among them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from datapipe.backends.chat import CHAT_PROMPT, bounded
from datapipe.backends.loading import ModelSettings, check_tokenizer, load, load_model, model_identity
from datapipe.backends.protocol import Pixels
from subject_diffusion.errors import BackendError

TASK_PROMPTS = {
    "paligemma": "caption en",
    "instructblip": "A short image description.",
    "florence2": "<CAPTION>",
}
"""What a model that was trained on tasks is told when the recipe has no prompt, because it does nothing useful without
one, by model type: PaliGemma's prefix, one of InstructBLIP's instructions, Florence-2's task token."""

CONTINUING = ("blip", "blip-2", "git")
"""Types of models whose caption goes on from the prompt and so begins with it; all others answer their prompt."""


class ImageToText:
    """Captions images, greedily or by beam search.

    BLIP, BLIP-2 and GIT continue the prompt, so that the caption begins with it. All other models answer it, and only
    the answer is the caption. A chat model is one whose processor has a chat template; its images are brought to
    between `min_pixels` and `max_pixels` pixels, because many encode every pixel that they are given.

    Calls may overlap: the network takes one batch at a time. `chat_prompt`: what a chat model is asked where there is
    no `prompt`; `must_chat`: whether any other model is refused.
    """

    def __init__(
        self,
        settings: ModelSettings,
        prompt: str,
        max_new_tokens: int,
        num_beams: int,
        *,
        min_pixels: int,
        max_pixels: int,
        chat_prompt: str = CHAT_PROMPT,
        must_chat: bool = False,
    ) -> None:
        self._network = _network(settings)
        self._model, self._processor = self._network.model, self._network.processor
        kind = self._model.config.model_type
        self._chats = bool(getattr(self._processor, "chat_template", None))
        if must_chat and not self._chats:
            raise BackendError(f"{settings.key} {settings.model}: is no chat model, and cannot list objects")
        self._continues = kind in CONTINUING and not self._chats
        self._prompt = prompt or (chat_prompt if self._chats else TASK_PROMPTS.get(kind, ""))
        self._refuse_tasks_without_words(settings.key)
        if kind == "paligemma":
            # Its processor wants to be told where the image is.
            self._prompt = f"{self._processor.image_token}{self._prompt}"
        if self._chats:
            # An answer must follow its own question, not padding.
            self._processor.tokenizer.padding_side = "left"
        self._pixels = min_pixels, max_pixels
        self._options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels]) -> list[str]:
        """See `Captioner`."""
        turns = self._turns(images) if self._chats else []
        with self._network.processing:
            inputs = self._chat_inputs(turns) if self._chats else self._inputs(images)
        # PaliGemma's processor adds labels for training.
        inputs.pop("labels", None)
        with self._network.computing:
            inputs = inputs.to(self._model.device, self._model.dtype)
            tokens = self._model.generate(**inputs, **self._options)
            if not self._continues:
                tokens = _without_prompt(tokens, inputs.get("input_ids"))
            tokens = tokens.cpu()
        with self._network.processing:
            captions: list[str] = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(c.split()) for c in captions]

    def _inputs(self, images: Sequence[Pixels]) -> Any:
        text = [self._prompt] * len(images) if self._prompt else None
        return self._processor(images=list(images), text=text, return_tensors="pt", padding=text is not None)

    def _turns(self, images: Sequence[Pixels]) -> list[list[dict[str, Any]]]:
        """One conversation per image: processors that take several images per text would give them all to the first."""
        return [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": bounded(Image.fromarray(image), *self._pixels)},
                        {"type": "text", "text": self._prompt},
                    ],
                }
            ]
            for image in images
        ]

    def _chat_inputs(self, turns: list[list[dict[str, Any]]]) -> Any:
        return self._processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def _refuse_tasks_without_words(self, key: str) -> None:
        """Florence-2 answers some of its tasks with coordinates. Raises BackendError."""
        answers: dict[str, str] = getattr(self._processor, "tasks_answer_post_processing_type", {})
        words = [task for task, kind in answers.items() if kind == "pure_text" and task.endswith("CAPTION>")]
        for task, kind in answers.items():
            if task in self._prompt and kind != "pure_text":
                raise BackendError(
                    f"{key.replace('model', 'prompt')} {self._prompt}: Florence-2 answers {task} with coordinates; "
                    f"captions come from {', '.join(words)}"
                )


class _Network:
    """A model, its processor, and a lock for each: a fast tokenizer raises when two threads use it."""

    def __init__(self, settings: ModelSettings) -> None:
        self.processor: Any = load(settings, AutoProcessor.from_pretrained)
        if not hasattr(self.processor, "image_processor"):
            raise BackendError(f"{settings.key} {settings.model}: comes without a processor for images and text")
        check_tokenizer(settings, self.processor.tokenizer)
        self.model: Any = load_model(settings, AutoModelForImageTextToText)
        self.computing, self.processing = threading.Lock(), threading.Lock()


_in_memory: WeakValueDictionary[tuple[str | None, ...], _Network] = WeakValueDictionary()
"""The networks of this process that are in use, so that two stages with the same model share it."""


def _network(settings: ModelSettings) -> _Network:
    """Raises BackendError."""
    which = model_identity(settings), settings.revision, settings.dtype, settings.device
    found = _in_memory.get(which)
    if found is None:
        found = _in_memory[which] = _Network(settings)
    return found


def _without_prompt(tokens: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    """`tokens` (B, L) as generated, `prompt` (B, P) as given -> what follows the prompt. A decoder alone repeats the
    prompt, one with an encoder does not."""
    if prompt is None or tokens.shape[1] < prompt.shape[1]:
        return tokens
    return tokens[:, prompt.shape[1] :] if torch.equal(tokens[:, : prompt.shape[1]], prompt) else tokens
