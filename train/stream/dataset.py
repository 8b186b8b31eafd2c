"""Shards -> batches, in an order that is a pure function, so that a run continues exactly where it stopped, on any
number of ranks and workers.

    stream = Stream("out/toy", batch_size=64, transform=SubjectTransform(size_px=256, max_subjects=4), seed=0)
    loader = StreamLoader(stream, workers=4)
    for batch in loader:            # the rest of this epoch
        ...
        state = loader.state_dict()

A batch belongs to all ranks together: each takes its own part of the same `batch_size` successive positions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, cast

from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import TypeVar

from subject_diffusion.errors import RunError
from train.stream.buckets import BucketedOrder, Buckets, bucketed_order
from train.stream.cache import ShardCache
from train.stream.order import MixedOrder, epoch_counts
from train.stream.reader import Columns, Reader, ReadPlan, Transform
from train.stream.shard_index import Index, open_index
from train.stream.source import Source

CACHE = Path("~/.cache/subject-diffusion/stream")
CACHE_BYTES = 50 << 30
WINDOW = 8
"""Shards within which samples are shuffled.

With 1,000 samples each, about one in 4,000 neighbors was a neighbor on disk."""


BatchT = TypeVar("BatchT", default=Columns)
"""The TypedDict that the stream's transform makes of a batch: `Stream[SubjectBatch]`."""


class Stream(IterableDataset[BatchT], Generic[BatchT]):
    """Batches of this rank, one epoch per iteration. Raises ShardError, RunError.

    sources: a path, or what to mix. batch_size: of all ranks together, which must divide it. transform: without one a
    batch has `members`, see RawMembers. mode: "train" shuffles and leaves out the end of an epoch that fills no batch;
    "evaluate" gives every sample once, as they lie on disk, and fills the last batch up with repeats that are not
    `valid`. Both give every rank the same number of batches. rank, ranks: by default those of torch.distributed.
    window: shards within which samples are shuffled. cache, cache_bytes: where downloads and indices are kept, shared
    by a machine's processes, and how much of downloads. buckets: the shapes that images are cut to; a batch has one,
    and what fills none is carried to the next epoch. samples_per_step: how many successive ones have one shape, where
    a training step takes several batches; by default batch_size.
    """

    def __init__(
        self,
        sources: str | Sequence[Source],
        batch_size: int,
        transform: Transform | None = None,
        *,
        seed: int = 0,
        mode: Literal["train", "evaluate"] = "train",
        rank: int | None = None,
        ranks: int | None = None,
        window: int = WINDOW,
        cache: str | Path = CACHE,
        cache_bytes: int = CACHE_BYTES,
        buckets: Buckets | None = None,
        samples_per_step: int | None = None,
    ) -> None:
        given = [Source(sources)] if isinstance(sources, str) else list(sources)
        rank, ranks = _placed(rank, ranks)
        if batch_size % ranks:
            raise RunError(f"batch_size {batch_size} cannot be shared by {ranks} ranks; choose a multiple")
        cache = Path(cache).expanduser()
        shards = ShardCache(cache, cache_bytes)
        indices = [open_index(s.path, s.keep, shards, s.key_rule) for s in given]
        counts = _shares(given, [len(i) for i in indices], mode)
        shuffled = mode == "train"
        firsts = [index.first for index in indices]
        order: MixedOrder | BucketedOrder = MixedOrder(firsts, counts, window, seed, shuffled)
        self._counts, self._buckets, self._step = counts, buckets, batch_size
        if buckets is not None:
            self._step = samples_per_step or batch_size
            _check_bucketed(given, indices, mode, batch_size, self._step)
            order = bucketed_order(buckets, [i.shapes for i in indices], firsts, counts, self._step, window, seed)
        self.plan = ReadPlan(
            given,
            indices,
            order,
            batch_size,
            transform,
            seed,
            shuffled,
            window,
            rank,
            ranks,
            cache,
            cache_bytes,
        )
        self._epoch = self._origin = self._index = 0
        if len(self) == 0:
            raise RunError(
                f"{', '.join(s.path for s in given)}: {sum(counts)} samples do not fill a batch of {self._step}; "
                "loosen the filter, or choose a smaller batch_size"
            )

    def __len__(self) -> int:
        """Batches of the epoch, the same for every rank."""
        return self.batches(self._epoch)

    def batches(self, epoch: int) -> int:
        """Those of an epoch; with buckets, not every one has as many."""
        return len(self._starts(epoch, 0))

    @functools.cached_property
    def contents(self) -> list[str]:
        """A hash of each source's shards and filter."""
        pairs = zip(self.plan.sources, self.plan.indices, strict=True)
        return [f"{index.fingerprint}-{source.keep.fingerprint}" for source, index in pairs]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the order: shards, wherever they lie, filters, mixture and window."""
        plan = self.plan
        names = "+".join(f"{content}*{n}" for content, n in zip(self.contents, self._counts, strict=True))
        bucketed = "" if self._buckets is None else f"/{self._buckets.fingerprint}*{self._step}"
        return f"{names}/{'train' if plan.shuffled else 'evaluate'}/{plan.window}{bucketed}"

    def state_dict(self) -> dict[str, Any]:
        """`epoch`, and `index`: samples of it given so far to all ranks together. `origin`: where the workers began to
        share out batches."""
        return {
            "epoch": self._epoch,
            "index": self._index,
            "origin": self._origin,
            "seed": self.plan.seed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there, whatever the ranks, workers and batch size. Raises RunError when the order is another."""
        for what, now in (("seed", self.plan.seed), ("fingerprint", self.fingerprint)):
            if state[what] != now:
                raise RunError(
                    f"the stream's state was saved with {what} {state[what]!r} and this one has {now!r}: its order is "
                    "another one; use the same sources, filters, weights, window and seed, or start afresh"
                )
        if self._buckets is not None and -int(state["index"]) % self._step % self.plan.batch_size:
            raise RunError(
                f"the state was saved at {state['index']}, within {self._step} samples of one shape, whose rest "
                f"is no multiple of batch_size {self.plan.batch_size}; choose the batch_size that it had"
            )
        self._epoch, self._index = int(state["epoch"]), int(state["index"])
        # A worker that is loaded again (by torchdata's StatefulDataLoader) goes on with its own share of the batches.
        self._origin = int(state["origin"]) if get_worker_info() else self._index

    def set_epoch(self, epoch: int) -> None:
        """For a plain DataLoader whose workers are not persistent: they cannot know how many epochs there were."""
        self._epoch, self._index, self._origin = epoch, 0, 0

    def __iter__(self) -> Iterator[BatchT]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        with Reader(self.plan) as reader:
            for turn, start in enumerate(self._starts(self._epoch, self._origin)):
                if turn % workers == number and start >= self._index:
                    batch = reader.batch(self._epoch, start)
                    self._index = start + self.plan.batch_size
                    yield cast(BatchT, batch)
        self._epoch, self._index, self._origin = self._epoch + 1, 0, 0

    def endless(self, epoch: int, index: int) -> Iterator[tuple[int, int]]:
        """(epoch, first position) of every batch from there on, through all epochs."""
        for now in itertools.count(epoch):
            yield from ((now, start) for start in self._starts(now, index if now == epoch else 0))

    def _starts(self, epoch: int, origin: int) -> range:
        """First positions of an epoch's batches, from `origin` on."""
        size = self.plan.batch_size
        return range(origin, self.plan.order.length(epoch) + 1 - (size if self.plan.shuffled else 1), size)


def _placed(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """This process's number and how many there are, by default those of torch.distributed."""
    together = distributed.is_available() and distributed.is_initialized()
    rank = rank if rank is not None else distributed.get_rank() if together else 0
    return rank, ranks if ranks is not None else distributed.get_world_size() if together else 1


def _check_bucketed(
    sources: Sequence[Source], indices: Sequence[Index], mode: str, batch_size: int, samples_per_step: int
) -> None:
    if mode == "evaluate":
        raise RunError("evaluation gives samples as they lie on disk; leave buckets out")
    if samples_per_step % batch_size:
        raise RunError(f"samples_per_step {samples_per_step} is no multiple of batch_size {batch_size}")
    for source, index in zip(sources, indices, strict=True):
        if not (index.shapes > 0).all():
            raise RunError(
                f"{source.path}: buckets need the images' sizes, from the sidecars that `sdd dataset` writes; "
                "there are none"
            )


def _shares(sources: Sequence[Source], sizes: Sequence[int], mode: str) -> list[int]:
    """Samples of each source in an epoch of the mixture."""
    weights = [s.weight for s in sources]
    given = [w for w in weights if w is not None]
    if given and (len(given) != len(weights) or min(given) < 0 or sum(given) <= 0):
        raise RunError(f"weights of the sources are {weights}: give each one a weight, none negative, or none at all")
    for source, size in zip(sources, sizes, strict=True):
        if source.weight and not size:
            raise RunError(
                f"{source.path}: no sample passes its filter, and weight asks for some; leave the source out"
            )
    if mode == "evaluate" and (given or any(s.epochs != 1 for s in sources)):
        raise RunError("evaluation goes once over every source; leave weight and epochs out")
    return epoch_counts(sizes, given or None, [s.epochs for s in sources])
