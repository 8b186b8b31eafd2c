"""What the subject model learns from: what `SubjectTransform` cuts, a reference of each subject in it, and all random
draws of the training step, so that they are the sample's own wherever it is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NotRequired, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datapipe.schema import IDENTITIES
from subject_diffusion.errors import RunError, ShardError
from train.stream.cache import ShardFile
from train.stream.order import crop_draws, reference_draws
from train.stream.shard_index import shows_any
from train.stream.source import Source
from train.stream.tar_sample import CorruptSampleError, RawSample
from train.stream.transform import SubjectBatch, SubjectExample, SubjectTransform
from train.trainer.encoder_cache import CachedOutputs, CachedReferences
from train.trainer.identities import Name, Pairs
from train.trainer.recipe import ExampleSettings
from train.trainer.references import draw_reference, photos, stored_mask


def check_entities(sources: Sequence[Source]) -> None:
    """Raises RunError where no image has a subject: there would be no reference to learn from. One source of several
    may have none, but not because of its filter."""
    found = []
    for source in sources:
        wanted = source.keep.model_copy(update={"min_entities": max(1, source.keep.min_entities)})
        found.append(shows_any(source.path, wanted))
        if source.keep.looks_at_entities and found[-1] is False:
            raise RunError(f"{source.path}: no entity is left after the filter; loosen `keep` of this source")
    if all(shows is False for shows in found):
        paths = ", ".join(source.path for source in sources)
        raise RunError(f"{paths}: no image has a subject; label it with `sdd dataset` and a recipe that finds some")


_Arrays = dict[str, NDArray[Any]]


class TrainingExample(SubjectExample):
    """What `SubjectTransform` gives, a reference of each subject, and all random draws of the training step."""

    references: NotRequired[NDArray[np.uint8]]
    """(M, 3, R, R) RGB, zeros where there is no subject."""
    classes: NotRequired[NDArray[np.float16]]
    """In their place, where they were encoded beforehand: (M, D), of `model.encode_references`."""
    patches: NotRequired[NDArray[np.float16]]
    """(M, P, W), likewise."""
    posterior: NotRequired[NDArray[np.float16]]
    """(2, C, h, w), where it was computed beforehand: the VAE's mean and standard deviation."""
    noise: NDArray[np.float32]
    """(2, C, h, w) ~ N(0, 1): that of the diffusion, and that of the VAE's posterior."""
    offset: NDArray[np.float32]
    """(C, 1, 1) ~ N(0, 1)."""
    timestep_draw: np.float32
    """~ U(0, 1)."""
    condition_draw: np.float32
    """~ U(0, 1)."""


class ExampleBatch(SubjectBatch):
    """B training examples, collated."""

    references: NotRequired[Tensor]
    classes: NotRequired[Tensor]
    patches: NotRequired[Tensor]
    posterior: NotRequired[Tensor]
    noise: Tensor
    offset: Tensor
    timestep_draw: Tensor
    condition_draw: Tensor


class TrainingExamples:
    """A transform of the stream, which makes a training example of a sample."""

    def __init__(
        self,
        settings: ExampleSettings,
        max_subjects: int,
        reference_px: int,
        latent_channels: int,
        latent_factor: int,
        pairs: Pairs | None = None,
    ) -> None:
        """reference_px: side of a reference, CLIP's input; latent_factor: image pixels per latent pixel, along each
        side. Raises RunError."""
        self._pairs = pairs
        self.latents: CachedOutputs | None = None
        self.references: CachedReferences | None = None
        self._crops = settings.crops
        self._cut = SubjectTransform(
            size_px=settings.size_px,
            max_subjects=max_subjects,
            min_visible=settings.min_visible,
            drop_subjects=settings.drop_subjects,
        )
        self._reference, self._reference_px = settings.reference, reference_px
        self._channels, self._factor = latent_channels, latent_factor
        if settings.reference.background == "photo":
            photos(settings.reference.photos)

    def __call__(self, raw: RawSample, rng: np.random.Generator) -> TrainingExample:
        crop = 0 if self._crops is None else int(rng.integers(self._crops))
        cut = self._cut(raw, rng if self._crops is None else crop_draws(raw.key, crop))
        height, width = cut["image"].shape[1:]
        for slot in np.flatnonzero(cut["present"]):
            if not cut["masks"][slot].any():  # labels without masks, or one outside the cut: the box stands in
                x1, y1, x2, y2 = cut["boxes"][slot] * (width, height, width, height)
                cut["masks"][slot, int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)] = True
        draws = self._reference.draws
        references = self._drawn_anew(raw, cut, rng) if draws is None else self._drawn_once(raw, cut, draws, rng)
        timestep, condition = rng.random(2, np.float32)
        latent = (self._channels, height // self._factor, width // self._factor)
        example: dict[str, Any] = {
            **cut,
            **references,
            "noise": rng.standard_normal((2, *latent), np.float32),
            "offset": rng.standard_normal((self._channels, 1, 1), np.float32),
            "timestep_draw": timestep,
            "condition_draw": condition,
        }
        if self.latents is not None:
            assert raw.shard is not None
            example["posterior"] = self.latents.read(raw, raw.shard, raw.key, crop, (2, *latent))
        return cast(TrainingExample, example)

    def _drawn_anew(self, raw: RawSample, cut: SubjectExample, rng: np.random.Generator) -> _Arrays:
        """References from the cut itself, or from other images of its subjects."""
        references = self._none(len(cut["present"]))
        names = _names(raw, cut) if self._pairs else []
        for slot in np.flatnonzero(cut["present"]):
            shown, mask = cut["image"].transpose(1, 2, 0), cut["masks"][slot]
            elsewhere = self._elsewhere(names[slot], rng) if names else None
            if elsewhere is not None:
                shown, mask = self._stored(raw, elsewhere)
            references[slot] = draw_reference(self._reference, shown, mask, self._reference_px, rng)
        return {"references": references}

    def _drawn_once(self, raw: RawSample, cut: SubjectExample, draws: int, rng: np.random.Generator) -> _Arrays:
        """References from stored images, whose draws are their subjects' own; or what they were encoded to."""
        slots = len(cut["present"])
        found = {"references": self._none(slots)} if self.references is None else self.references.none(slots)
        for slot, own in enumerate(_names(raw, cut)):
            name, draw = self._elsewhere(own, rng) or own, int(rng.integers(draws))
            one = self._drawn(raw, name, draw) if self.references is None else self._read(raw, name, draw)
            for part, values in one.items():
                found[part][slot] = values
        return found

    def _read(self, raw: RawSample, name: Name, draw: int) -> _Arrays:
        assert self.references is not None
        try:
            return self.references.read(raw, self._shard(raw, name), *name[1:], draw)
        except ShardError:
            # One of whose draws any fails was left out, and says here what it suffers from.
            for each in range(self._reference.draws or 0):
                self._drawn(raw, name, each)
            raise

    def _drawn(self, raw: RawSample, name: Name, draw: int) -> _Arrays:
        rng = reference_draws(*name[1:], draw)
        return {"references": draw_reference(self._reference, *self._stored(raw, name), self._reference_px, rng)}

    def _stored(self, raw: RawSample, name: Name) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The stored image of an entity, of this sample or of another one, and its mask there."""
        source, key, number = name
        shown = raw if self._pairs is None or key == raw.key else self._pairs.read(name)
        entities = shown.every_entity()
        if number >= len(entities):
            raise CorruptSampleError(f"{IDENTITIES} of {source}: sample {key} has no entity {number}")
        image = shown.image()
        return image, stored_mask(image, entities[number])

    def _shard(self, raw: RawSample, name: Name) -> ShardFile:
        found = raw.shard if self._pairs is None or name[1] == raw.key else self._pairs.shard(name)
        assert found is not None
        return found

    def _elsewhere(self, name: Name, rng: np.random.Generator) -> Name | None:
        """The same subject in another image."""
        if not self._pairs or rng.random() >= self._reference.cross_image:
            return None
        return self._pairs.draw(name, rng)

    def _none(self, slots: int) -> NDArray[np.uint8]:
        return np.zeros((slots, 3, self._reference_px, self._reference_px), np.uint8)


def _names(raw: RawSample, cut: SubjectExample) -> list[Name]:
    """The subjects of a cut, each by its number among all entities of the sample, whatever the filter wants."""
    every = raw.every_entity()
    wanted = raw.keep.entities(every)
    return [(raw.source, raw.key, every.index(wanted[place])) for place in cut["entities"] if place >= 0]
