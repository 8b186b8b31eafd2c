"""How well a generated subject matches its reference: it is found in the sample, cut out, and compared.

A new metric is a function with its formula here and a line in `METRICS`; reports and their tables follow.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from datapipe.recipe import Recipe, build_stage
from datapipe.schema import Entity, Sample, StageName, Tag
from model import ModelError, Subject, reference_tensor
from model.base import UNLOADABLE, first_line
from model.mention import find_mention
from subject_diffusion.errors import RunError
from subject_diffusion.loading_bars import no_loading_bars
from subject_diffusion.packaged import local_path
from train.evaluation.cases import Case
from train.evaluation.cutout import Cutout, colors_apart
from train.evaluation.individuals import Individual, Individuals

Mask = NDArray[np.bool_]


class Locator:
    """Finds subjects in pictures with a dataset recipe's detector and segmenter."""

    def __init__(self, recipe: Recipe) -> None:
        self._stages = [build_stage(name, recipe) for name in (StageName.GROUND, StageName.SEGMENT)]

    def __call__(self, image: Image.Image, caption: str, subjects: Sequence[Subject]) -> list[Mask | None]:
        """For each subject the mask of the best box of its tag, that with the greatest overlap with the box asked for;
        None where there is none. (H, W) bool. Raises RunError where the caption does not name a tag."""
        sink = io.BytesIO()
        image.save(sink, "PNG")
        tags = tuple(Tag(s.tag, _span(caption, s.tag)) for s in subjects)
        samples = [
            Sample(row=0, image=sink.getvalue(), width=image.width, height=image.height, caption=caption, tags=tags)
        ]
        for stage in self._stages:
            samples = list(stage(samples))
        return [self._best(samples[0].candidates, subject, image) for subject in subjects]

    def _best(self, candidates: Sequence[Entity], subject: Subject, image: Image.Image) -> Mask | None:
        x1, y1, x2, y2 = _pixels(subject, image)
        named = [c for c in candidates if c.tag == subject.tag and c.mask is not None]
        if not named:
            return None
        xywh = [[c.box[0], c.box[1], c.box[2] - c.box[0], c.box[3] - c.box[1]] for c in named]
        overlaps = coco_mask.iou(np.array(xywh), np.array([[x1, y1, x2 - x1, y2 - y1]]), [0])[:, 0]
        best = max(range(len(named)), key=lambda i: (round(float(overlaps[i]), 2), named[i].score))
        rle = named[best].mask
        assert rle is not None
        mask = rle.array()
        return mask if mask.any() else None


class Clip:
    """A whole CLIP, for pictures and for texts. Its embeddings are on the CPU."""

    @no_loading_bars()
    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        """Raises ModelError."""
        self._device, folder = device, local_path(folder)
        try:
            self._model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            processor = CLIPImageProcessor.from_pretrained(folder)
        except UNLOADABLE as error:
            raise ModelError(f"CLIP {folder}: {first_line(error)}") from None
        self.side = int(self._model.config.vision_config.image_size)
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D) of length 1, of square pictures."""
        resized = [reference_tensor(p.resize((self.side, self.side), Image.Resampling.BICUBIC)) for p in pictures]
        pixels = (torch.stack(resized) / 255 - self._mean) / self._std
        return _unit(self._model.get_image_features(pixel_values=pixels.to(self._device)))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """(N, D) of length 1."""
        tokens = self._tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return _unit(self._model.get_text_features(**tokens.to(self._device)))


@dataclass(frozen=True)
class Pair:
    """A subject's reference, and what a sample shows in its place."""

    reference: Cutout
    generated: Cutout
    embeddings: Tensor
    """(2, D): CLIP's of both, of length 1."""
    identities: Tensor
    """(2, E): the identity encoder's of both, of length 1."""
    rivals: list[Individual]
    """Others of the noun."""
    detected: bool
    """Whether the detector found the tag in the sample; else the box that was asked for is compared."""


def clip_similarity(pair: Pair) -> float:
    """cos(f(r), f(g)), where f is CLIP's image embedding: CLIP-I of DreamBooth, of cutouts."""
    return float(pair.embeddings[0] @ pair.embeddings[1])


def color_distance(pair: Pair) -> float:
    """`colors_apart` of reference and sample."""
    return colors_apart(pair.reference, pair.generated)


def pattern_distance(pair: Pair) -> float:
    """mean ‖r − g‖ (CIELAB) over the places inside both masks: colors at the same places. Black to white and more where
    the masks do not meet."""
    both = pair.reference.inside & pair.generated.inside
    if not both.any():
        return float(np.linalg.norm([100, 100, 100]))
    return float(np.linalg.norm(pair.reference.lab[both] - pair.generated.lab[both], axis=1).mean())


def identity(pair: Pair) -> float:
    """1 where cos(e(r), e(g)) > cos(e(o), e(g)) for each of the other individuals o of the noun, at most 7, else 0,
    where e is the identity encoder: top-1 retrieval of the reference by the sample."""
    reference, generated = pair.identities
    return float(all(reference @ generated > rival.embedding @ generated for rival in pair.rivals))


def identity_by_color(pair: Pair) -> float:
    """`identity` with the smallest `colors_apart` in place of the largest cosine: for samples too rough for an encoder
    that has seen true images alone."""
    own = colors_apart(pair.reference, pair.generated)
    return float(all(own < colors_apart(rival.cutout, pair.generated) for rival in pair.rivals))


def found(pair: Pair) -> float:
    """1 where the detector finds the tag in the sample, else 0."""
    return float(pair.detected)


@dataclass(frozen=True)
class Metric:
    """A score of one subject in one sample. better: 1 where more of it is better, -1 where less is."""

    value: Callable[[Pair], float]
    better: Literal[1, -1]


METRICS: dict[str, Metric] = {
    "identity": Metric(identity, 1),
    "identity by color": Metric(identity_by_color, 1),
    "clip": Metric(clip_similarity, 1),
    "color": Metric(color_distance, -1),
    "pattern": Metric(pattern_distance, -1),
    "found": Metric(found, 1),
}
"""By name, as reports show them."""

Scores = dict[str, float]
"""A value for each of `METRICS`."""


def score_subjects(
    case: Case, sample: Image.Image, locate: Locator, clip: Clip, individuals: Individuals
) -> list[Scores]:
    """Every subject's reference against what the sample shows in its place."""
    pairs = []
    masks = locate(sample, case.caption, case.subjects)
    for subject, name, mask in zip(case.subjects, case.individuals, masks, strict=True):
        reference, generated = _cutouts(subject, sample, mask)
        seen = [(subject.picture, _mask(subject)), (sample, _box_mask(subject, sample) if mask is None else mask)]
        pairs.append(
            Pair(
                reference,
                generated,
                embeddings=clip.images([reference.picture, generated.picture]),
                identities=torch.stack([individuals.embedding(*one) for one in seen]),
                rivals=individuals.rivals(subject.tag, name),
                detected=mask is not None,
            )
        )
    return [{name: metric.value(pair) for name, metric in METRICS.items()} for pair in pairs]


def find_cutouts(
    subjects: Sequence[Subject], sample: Image.Image, caption: str, locate: Locator
) -> list[tuple[Cutout, Cutout]]:
    """Each subject's reference, and what the sample shows in its place."""
    masks = locate(sample, caption, subjects)
    return [_cutouts(subject, sample, mask) for subject, mask in zip(subjects, masks, strict=True)]


def _cutouts(subject: Subject, sample: Image.Image, mask: Mask | None) -> tuple[Cutout, Cutout]:
    """mask: where the sample shows the subject; None: not found, so that the box that was asked for stands in."""
    return Cutout(subject.picture, _mask(subject)), Cutout(sample, _box_mask(subject, sample) if mask is None else mask)


def _mask(subject: Subject) -> Mask:
    mask = subject.mask_array()
    assert mask is not None
    return mask


def _span(caption: str, tag: str) -> tuple[int, int]:
    found = find_mention(caption, tag)
    if found is None:
        raise RunError(f"{caption!r} does not name the subject {tag!r}, which is looked for; name it in the prompt")
    return found.span()


def _box_mask(subject: Subject, sample: Image.Image) -> Mask:
    """The box that the subject was asked for in, at least one pixel of it."""
    asked = np.zeros((sample.height, sample.width), bool)
    x1, y1, x2, y2 = (round(v) for v in _pixels(subject, sample))
    asked[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = True
    return asked


def _pixels(subject: Subject, image: Image.Image) -> list[float]:
    assert subject.box is not None
    return [v * side for v, side in zip(subject.box, image.size * 2, strict=True)]


def _unit(features: Any) -> Tensor:
    # transformers 5 wraps what 4 gave bare.
    bare: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return functional.normalize(bare, dim=-1).cpu()
