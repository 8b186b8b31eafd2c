"""One process's reading: positions of the order become batches. Opens shards, reads ahead, replaces corrupt samples."""

from __future__ import annotations

import functools
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from subject_diffusion.errors import ShardError
from train.stream.buckets import BucketedOrder
from train.stream.cache import ShardCache
from train.stream.order import MixedOrder, Places, draws, replacement
from train.stream.shard_index import Index
from train.stream.source import Source
from train.stream.tar_sample import CorruptSampleError, RawSample, Span, parse_members

Transform = Callable[[RawSample, np.random.Generator], Mapping[str, Any]]
"""Makes an example of a sample. All examples have the same keys, and arrays under one key have one shape."""

_DOWNLOADS = 4
_MOST_REPLACEMENTS = 8
_APART = 4  # windows that buckets may be apart from each other, whose shards stay open
_LONGEST_REASON = 200  # characters


@dataclass(frozen=True)
class ReadPlan:
    """What a stream reads, and for whom. sources, indices: one for each source; the rest: see `dataset.Stream`."""

    sources: Sequence[Source]
    indices: Sequence[Index]
    order: MixedOrder | BucketedOrder
    batch_size: int
    transform: Transform | None
    seed: int
    shuffled: bool
    window: int
    rank: int
    ranks: int
    cache: Path
    cache_bytes: int


@dataclass(frozen=True)
class Replaced:
    """A corrupt sample, for which another one was given."""

    epoch: int
    position: int
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class RawMembers:
    """The members of each sample of a batch that was not transformed: contents by what follows the key's dot.

    data: (bytes,) uint8, of all samples. No `collections.abc.Sequence`, because DataLoader takes those apart.
    """

    data: torch.Tensor
    spans: Sequence[Mapping[str, Span]]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int) -> dict[str, memoryview]:
        data = self.data.numpy().data
        return {name: data[start:end] for name, (start, end) in self.spans[row].items()}


class BatchBase(TypedDict):
    """What every batch holds, whatever the transform."""

    key: list[str]
    source: torch.Tensor
    """(B,) int64, number of the source."""
    valid: torch.Tensor
    """(B,) bool: False where a pass over evaluation data has come to its end."""
    replaced: list[Replaced]
    """The corrupt samples in whose place others stand."""


class RawBatch(BatchBase):
    """A batch of a stream without a transform."""

    members: RawMembers


Columns = dict[str, Any]
"""A batch while it is made and sent: arrays of all examples stacked to tensors (B, …), anything else as lists of B. A
stream gives it as the TypedDict that belongs to its transform."""

Row = TypeVar("Row")
Allocator = Callable[[tuple[int, ...], Any], NDArray[Any]]
"""As np.empty."""


@dataclass(frozen=True)
class _Wanted:
    """What belongs to a position: a sample of a source. alike, shape: see `Places`; alike of this source."""

    epoch: int
    position: int
    source: int
    sample: int
    alike: Sequence[int] | NDArray[np.int64]
    shape: tuple[int, int] | None


def _wanted(epoch: int, positions: NDArray[np.int64], places: Places) -> list[_Wanted]:
    found = zip(positions.tolist(), places.sources.tolist(), places.samples.tolist(), strict=True)
    return [_Wanted(epoch, p, source, sample, places.alike[source], places.shape) for p, source, sample in found]


class Reader:
    """Gives any batch of a plan. To be used as a context: it holds files and threads."""

    def __init__(self, plan: ReadPlan) -> None:
        self._plan = plan
        self._cache = ShardCache(plan.cache, plan.cache_bytes)
        windows = 2 * (min(_APART, len(plan.order.buckets)) if isinstance(plan.order, BucketedOrder) else 1)
        self._most_files = (windows * plan.window + 1) * len(plan.indices)
        self._files: OrderedDict[tuple[int, int], Future[int]] = OrderedDict()
        self._openers = ThreadPoolExecutor(_DOWNLOADS)
        self._process = os.getpid()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        # An iterator that nobody ended comes here from the garbage collector, in any thread, even the one that
        # downloads: nothing may wait. Nor can a copy in a forked worker know who held its locks.
        if os.getpid() != self._process:
            return
        self._openers.shutdown(wait=False, cancel_futures=True)
        while self._files:
            self._close(self._files.popitem()[1])

    def batch(self, epoch: int, start: int, empty: Allocator = np.empty) -> Columns:
        """This rank's part of the batch that begins at position `start`, in memory from `empty`."""
        plan = self._plan
        epoch = epoch if plan.shuffled else 0  # an evaluation sees the same in every pass
        share = plan.batch_size // plan.ranks
        positions = start + plan.rank * share + np.arange(share)
        valid = positions < plan.order.length(epoch)
        positions = positions % plan.order.length(epoch)
        places = plan.order.locate(epoch, positions)
        for shard in places.ahead:
            self._file(*shard)

        replaced: list[Replaced] = []
        make = self._raw if plan.transform is None else self._transformed
        batch = make(_wanted(epoch, positions, places), replaced, empty)
        return batch | {
            "source": torch.from_numpy(places.sources),
            "valid": torch.from_numpy(valid),
            "replaced": replaced,
        }

    def _transformed(self, wanted: Sequence[_Wanted], replaced: list[Replaced], empty: Allocator) -> Columns:
        transform, seed = self._plan.transform, self._plan.seed
        assert transform is not None

        def row(w: _Wanted, sample: int) -> dict[str, Any]:
            data = memoryview(bytearray(int(self._plan.indices[w.source].sizes[sample])))
            key, spans = self._read(w.source, sample, data)
            members = {name: data[start:end] for name, (start, end) in spans.items()}
            source = self._plan.sources[w.source]
            shard = self._plan.indices[w.source].shard_of(sample)
            raw = RawSample(key, members, source.keep, source.path, w.shape, shard)
            return {"key": key, **_isolated(transform, raw, draws(seed, w.epoch, w.position))}

        return collate([self._usable(w, replaced, functools.partial(row, w)) for w in wanted], empty)

    def _raw(self, wanted: Sequence[_Wanted], replaced: list[Replaced], empty: Allocator) -> Columns:
        """Reads every sample straight to where it stays."""
        sizes = [int(self._plan.indices[w.source].sizes[w.sample]) for w in wanted]
        starts = [0, *itertools.accumulate(sizes)]
        data, late = torch.from_numpy(empty((starts[-1],), np.uint8)), bytearray()
        view = data.numpy().data

        def row(w: _Wanted, start: int, sample: int) -> tuple[str, dict[str, Span]]:
            size = int(self._plan.indices[w.source].sizes[sample])
            if sample == w.sample:
                target = view[start : start + size]
            else:
                start, target = len(view) + len(late), memoryview(bytearray(size))
            key, spans = self._read(w.source, sample, target)
            if sample != w.sample:
                late.extend(target)
            return key, {name: (start + first, start + end) for name, (first, end) in spans.items()}

        rows = [
            self._usable(w, replaced, functools.partial(row, w, start))
            for w, start in zip(wanted, starts, strict=False)
        ]
        if late:
            data = torch.cat([data, torch.frombuffer(late, dtype=torch.uint8)])
        return {"key": [key for key, _ in rows], "members": RawMembers(data, [spans for _, spans in rows])}

    def _usable(self, w: _Wanted, replaced: list[Replaced], use: Callable[[int], Row]) -> Row:
        """What `use` makes of the sample wanted or, where that is corrupt, of another one of its source and bucket,
        always the same."""
        sample = w.sample
        for attempt in range(_MOST_REPLACEMENTS + 1):
            try:
                return use(sample)
            except CorruptSampleError as error:
                replaced.append(Replaced(w.epoch, w.position, *self._name(w.source, sample), str(error)))
                sample = int(w.alike[replacement(len(w.alike), self._plan.seed, w.epoch, w.position, attempt)])
        raise ShardError(
            f"{replaced[-1].shard}: {_MOST_REPLACEMENTS + 1} samples drawn in a row are corrupt, the last one "
            f"{replaced[-1].key} ({replaced[-1].reason}); make these shards again"
        )

    def _file(self, source: int, shard: int) -> Future[int]:
        """The descriptor of an open shard, or of one that is being fetched."""
        if (source, shard) not in self._files:
            self._files[source, shard] = self._openers.submit(
                self._cache.open, self._plan.indices[source].shards[shard]
            )
            if len(self._files) > self._most_files:
                self._close(self._files.popitem(last=False)[1])
        self._files.move_to_end((source, shard))
        return self._files[source, shard]

    def _read(self, source: int, sample: int, target: memoryview) -> tuple[str, dict[str, Span]]:
        """Reads a sample into `target`; its key and members."""
        ((shard, offset, _),) = self._plan.indices[source].places(np.array([sample]))
        if os.preadv(self._file(source, shard).result(), [target], offset) != len(target):
            raise CorruptSampleError("the tar ends early")
        return parse_members(target, self._plan.indices[source].shards[shard].key_rule)

    def _name(self, source: int, sample: int) -> tuple[str, str]:
        """Shard and key of a corrupt sample; its number in the shard where not even the key can be read."""
        index = self._plan.indices[source]
        ((shard, _, size),) = index.places(np.array([sample]))
        try:
            key, _ = self._read(source, sample, memoryview(bytearray(size)))
        except CorruptSampleError:
            key = f"sample {sample - int(index.first[shard])}"
        return index.shards[shard].url, key

    @staticmethod
    def _close(file: Future[int]) -> None:
        if not file.cancel():
            file.add_done_callback(_close_opened)


def _isolated(transform: Transform, raw: RawSample, rng: np.random.Generator) -> Mapping[str, Any]:
    """What a transform makes of a sample. Whatever it stumbles over is the sample's fault, so that one corrupt
    annotation among millions does not end a run; where it is the transform's, the next samples fail, too, and the
    stream ends with the reason."""
    try:
        return transform(raw, rng)
    except (CorruptSampleError, ShardError):  # a shard that cannot be read says so itself
        raise
    except Exception as error:
        raise CorruptSampleError(" ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]) from error


def _close_opened(file: Future[int]) -> None:
    if file.exception() is None:
        os.close(file.result())


def collate(rows: Sequence[Mapping[str, Any]], empty: Allocator) -> Columns:
    """Arrays and numbers of all rows stacked to tensors, anything else as lists. Tensors keep the arrays' order in
    memory: an image that was transposed to (3, H, W) is not copied pixel by pixel, and comes as channels_last."""
    batch: Columns = {}
    for name, value in rows[0].items():
        column = [row[name] for row in rows]
        stackable = isinstance(value, np.ndarray | np.generic | int | float)
        batch[name] = _stack([np.asarray(v) for v in column], empty) if stackable else column
    return batch


def _stack(arrays: Sequence[NDArray[Any]], empty: Allocator) -> torch.Tensor:
    axes = sorted(range(arrays[0].ndim), key=lambda axis: -arrays[0].strides[axis])
    ordered = [array.transpose(axes) for array in arrays]
    stacked = empty((len(arrays), *ordered[0].shape), arrays[0].dtype)
    np.stack(ordered, out=stacked)
    return torch.from_numpy(stacked).permute(0, *(1 + axes.index(axis) for axis in range(len(axes))))
