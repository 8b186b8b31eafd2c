"""The individuals that a dataset shows, among whom a subject in a sample is taken for one: what people see at a
glance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datapipe.backends.patch_features import PatchFeatures
from datapipe.pairs.settings import EmbedSettings
from model.reference import Mask
from train.evaluation.cases import Case
from train.evaluation.cutout import Cutout
from train.trainer.identities import Name

RIVALS = 7
"""Other individuals of the noun that a reference is told from, where the dataset has as many."""


@dataclass(frozen=True)
class Individual:
    """As one image shows it. embedding: of `Individuals.embedding`."""

    embedding: Tensor
    cutout: Cutout


class Individuals:
    """Those that a dataset shows, by an encoder that tells them apart."""

    def __init__(self, settings: EmbedSettings, pool: Sequence[Case]) -> None:
        """pool: images to take the other individuals from. Raises BackendError."""
        self._encode = PatchFeatures(settings, settings.grid)
        self._by_tag: dict[str, dict[Name, Individual]] = defaultdict(dict)
        for case in pool:
            for subject, name in zip(case.subjects, case.individuals, strict=True):
                mask = subject.mask_array()
                if mask is not None and name not in self._by_tag[subject.tag]:
                    seen = Individual(self.embedding(subject.picture, mask), Cutout(subject.picture, mask))
                    self._by_tag[subject.tag][name] = seen

    def embedding(self, image: Image.Image, mask: Mask) -> Tensor:
        """(D,) float32 of length 1, of what an image shows inside a mask."""
        (features,) = self._encode([(np.asarray(image.convert("RGB")), mask)])
        return torch.from_numpy(features.embedding)

    def chance(self, case: Case) -> float:
        """The share of a case's subjects that a guess takes for whom they are."""
        names = zip(case.subjects, case.individuals, strict=True)
        return float(np.mean([1 / (1 + len(self.rivals(subject.tag, name))) for subject, name in names]))

    def rivals(self, tag: str, individual: Name) -> list[Individual]:
        """Up to RIVALS: the next ones of the noun after an individual, in the order of the pool, and round."""
        names = list(self._by_tag[tag])
        here = names.index(individual) if individual in names else 0
        others = [name for name in names[here:] + names[:here] if name != individual]
        return [self._by_tag[tag][name] for name in others[:RIVALS]]
