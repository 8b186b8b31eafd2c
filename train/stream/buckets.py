"""Buckets: images are cut to one of several shapes, whichever is nearest to their own, and a batch has one shape.

This is aspect ratio bucketing (NovelAI 2022; kohya's sd-scripts), made a pure function of (seed, epoch, position).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from subject_diffusion.settings import Settings
from train.stream.order import Integers, MixedOrder, Mixture, Places, shared_out

Shape = tuple[int, int]
"""Height and width, in pixels."""


class Buckets(Settings):
    """The shapes: with each multiple of `step_px` for a shorter side, the longest other side that keeps to the area."""

    sizes_px: tuple[int, ...] = Field(min_length=1)
    """Turns buckets on. Shapes have about the area of squares of these sides; an image goes to the largest size that it
    fills, and there to the nearest aspect."""
    step_px: int = Field(64, ge=8)
    """Sides are multiples of it. NovelAI and kohya: 64."""
    max_ratio: float = Field(2.0, ge=1)
    """Longer side by shorter side, at most; of a longer image the ends are cut off."""

    @model_validator(mode="after")
    def _sizes_are_whole_steps(self) -> Buckets:
        for size in self.sizes_px:
            if size < self.step_px or size % self.step_px:
                raise ValueError(f"sizes_px {size} is no multiple of step_px {self.step_px}")
        return self

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]

    def shapes(self, size_px: int) -> list[Shape]:
        """Those of one size, from the tallest to the widest."""
        found: set[Shape] = set()
        for short in range(self.step_px, size_px + 1, self.step_px):
            long = size_px**2 // short // self.step_px * self.step_px
            if long <= self.max_ratio * short:
                found |= {(short, long), (long, short)}
        return sorted(found, key=_ratio)

    def every_shape(self) -> list[Shape]:
        """Those of all sizes, the smallest first."""
        return [shape for size in self._sorted_sizes for shape in self.shapes(size)]

    def nearest(self, shapes: NDArray[np.int32]) -> Integers:
        """shapes: (N, 2) height and width of images. Returns (N,) places in `every_shape`. What is computed is rounded
        alike on every machine."""
        height, width = shapes.astype(np.int64).T
        areas = [size**2 for size in self._sorted_sizes]
        sizes = np.maximum(np.searchsorted(areas, height * width, side="right") - 1, 0)
        ratios, found, before = width / height, np.empty(len(shapes), np.int64), 0
        for number, size in enumerate(self._sorted_sizes):
            here = sizes == number
            own = np.array([w / h for h, w in self.shapes(size)])
            found[here] = before + np.searchsorted(np.sqrt(own[1:] * own[:-1]), ratios[here])
            before += len(own)
        return found

    @property
    def _sorted_sizes(self) -> list[int]:
        return sorted(set(self.sizes_px))


@dataclass(frozen=True)
class Bucket:
    """What is cut to one shape. members: for each source, its samples in it, rising; order: of these, each numbered by
    its place among its source's members."""

    shape: Shape
    members: Sequence[Integers]
    order: MixedOrder

    def locate(self, positions: Integers) -> Places:
        """positions: (n,) rising, through all epochs of the bucket."""
        places = self.order.through_epochs(positions)
        samples = np.empty_like(places.samples)
        for source, members in enumerate(self.members):
            here = places.sources == source
            samples[here] = members[places.samples[here]]
        return replace(places, samples=samples, alike=self.members, shape=self.shape)


class BucketedOrder:
    """An order in which every `step` successive positions, from the first, are of one bucket.

    Each bucket has an order without end. Of one with n samples in an epoch, epoch e takes the steps from ⌊en / step⌋
    up to ⌊(e + 1)n / step⌋: what fills no step is the first of the next epoch. Which bucket's step comes next is drawn
    as a mixture's sources are, so that all go through the shards at the same pace.
    """

    def __init__(
        self, buckets: Sequence[Bucket], step: int, seed: int, joined: Mapping[Shape, Shape], moved: int
    ) -> None:
        """joined: the shape that stands for each; moved: samples of an epoch that are not in the bucket nearest to
        them."""
        self.buckets, self.joined, self.moved = buckets, joined, moved
        self._step, self._seed = step, seed
        self._sizes = [len(bucket.order) for bucket in buckets]
        self._held: tuple[int, Mixture] = (-1, Mixture([0], seed, True))

    def described(self) -> str:
        """The shapes, and how many images of an epoch are cut to each, in words."""
        shapes = [f"{b.shape[0]} x {b.shape[1]} ({size:,})" for b, size in zip(self.buckets, self._sizes, strict=True)]
        moved = f"; {self.moved:,} of shapes too rare to fill a step go to the nearest" if self.moved else ""
        return f"images are cut to height x width (images of an epoch): {', '.join(shapes)}{moved}"

    def length(self, epoch: int) -> int:
        """Positions of an epoch, a multiple of `step`."""
        return self._step * len(self._mixture(epoch))

    def locate(self, epoch: int, positions: Integers) -> Places:
        """positions: (n,) rising, of one step."""
        step, inside = positions[:1] // self._step, positions % self._step
        (bucket,), (ordinal,) = self._mixture(epoch).locate(epoch, step)
        first = (self._steps_before(epoch, bucket) + ordinal) * self._step
        found: Places = self.buckets[bucket].locate(first + inside)
        return found

    def _mixture(self, epoch: int) -> Mixture:
        """Of the buckets' steps."""
        if self._held[0] != epoch:
            steps = [self._steps_before(epoch + 1, b) - self._steps_before(epoch, b) for b in range(len(self.buckets))]
            self._held = (epoch, Mixture(steps, self._seed, shuffled=True))
        return self._held[1]

    def _steps_before(self, epoch: int, bucket: int) -> int:
        return epoch * self._sizes[bucket] // self._step


def bucketed_order(
    buckets: Buckets,
    shapes: Sequence[NDArray[np.int32]],
    firsts: Sequence[Integers],
    counts: Sequence[int],
    step: int,
    window: int,
    seed: int,
) -> BucketedOrder:
    """shapes: for each source, (N, 2) height and width of its images; the rest as `MixedOrder` and `BucketedOrder` have
    it. A bucket that would not fill a step in an epoch is joined with the one whose aspect is nearest."""
    every = buckets.every_shape()
    nearest = [buckets.nearest(of_source) for of_source in shapes]
    held = [np.bincount(of_source, minlength=len(every)) for of_source in nearest]
    shares = np.array([shared_out(n, own) if n else 0 * own for n, own in zip(counts, held, strict=True)])
    joined = _joined(every, shares.sum(axis=0).tolist(), step)
    moved = int(shares.sum(axis=0)[joined != np.arange(len(every))].sum())
    members = [_members(joined[of_source], len(every)) for of_source in nearest]
    made = []
    for number in np.unique(joined[shares.any(axis=0)]).tolist():
        own = [of_source[number] for of_source in members]
        own_firsts = [np.searchsorted(m, first) for m, first in zip(own, firsts, strict=True)]
        own_counts = shares[:, joined == number].sum(axis=1).tolist()
        order = MixedOrder(own_firsts, own_counts, window, seed, shuffled=True)
        made.append(Bucket(every[number], own, order))
    by_shape = {shape: every[number] for shape, number in zip(every, joined.tolist(), strict=True)}
    return BucketedOrder(made, step, seed, by_shape, moved)


def _members(numbers: Integers, count: int) -> list[Integers]:
    """numbers: (N,) bucket of each sample. Returns the samples of each bucket, rising."""
    ends = np.cumsum(np.bincount(numbers, minlength=count))
    return np.split(np.argsort(numbers, kind="stable"), ends[:-1])


def _joined(shapes: Sequence[Shape], counts: list[int], least: int) -> Integers:
    """Which shape stands for each. The rarest goes to the nearest until each has `least` samples, or there is one."""
    joined, counts = np.arange(len(shapes)), list(counts)
    while True:
        there = [number for number, count in enumerate(counts) if count]
        rarest = min(there, key=lambda number: counts[number], default=0)
        if len(there) < 2 or counts[rarest] >= least:
            return joined
        others = [number for number in there if number != rarest]
        near = min(others, key=lambda number: _distance(shapes[number], shapes[rarest]))
        counts[near], counts[rarest] = counts[near] + counts[rarest], 0
        joined[joined == rarest] = near


def _ratio(shape: Shape) -> Fraction:
    return Fraction(shape[1], shape[0])


def _distance(one: Shape, other: Shape) -> tuple[Fraction, int]:
    """By how much the aspects differ; then, the areas. Exact: every rank decides alike."""
    ratio = _ratio(one) / _ratio(other)
    return max(ratio, 1 / ratio), abs(one[0] * one[1] - other[0] * other[1])
