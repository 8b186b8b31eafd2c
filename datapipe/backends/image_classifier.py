"""The image classifiers in transformers: ViT, Swin, SigLIP and others, with whatever labels they were trained on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoImageProcessor, AutoModelForImageClassification

from datapipe.backends.loading import ModelSettings, load, load_model
from datapipe.backends.protocol import Pixels


class HubClassifier:
    """See `ImageClassifier`. Calls may overlap: the network takes one batch at a time."""

    def __init__(self, settings: ModelSettings) -> None:
        self._processor: Any = load(settings, AutoImageProcessor.from_pretrained)
        self._model = load_model(settings, AutoModelForImageClassification)
        config = self._model.config
        self.labels = tuple(config.id2label[number] for number in range(config.num_labels))
        self.independent = config.problem_type == "multi_label_classification" or config.num_labels == 1
        self._network = threading.Lock()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Pixels]) -> NDArray[np.float32]:
        inputs = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        with self._network:
            inputs = inputs.to(self._model.device, self._model.dtype)
            logits = self._model(**inputs).logits.float().cpu()
        if not logits.isfinite().all():
            raise FloatingPointError("the classifier's output is not finite")
        probabilities = logits.sigmoid() if self.independent else logits.softmax(-1)
        return np.asarray(probabilities.numpy(), np.float32)
