"""A stream's batches through worker processes that never end, and the state of those handed out."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from subject_diffusion.errors import SddError
from train.stream.dataset import BatchT, Stream
from train.stream.reader import Columns, Reader, Replaced
from train.stream.shared_memory import Slot, TensorPlace, tensor_at


class StreamLoader(Generic[BatchT]):
    """A stream through worker processes, whose state is that of the batches handed out, not of those read ahead.

    An iteration gives the rest of the epoch. The next one goes on with the same workers, which have read ahead by then.
    `replaced`: every corrupt sample of the batches so far.
    """

    def __init__(self, stream: Stream[BatchT], workers: int = 0, prefetch: int = 2, pin_memory: bool = False) -> None:
        self.stream, self.replaced = stream, list[Replaced]()
        self._pinned = pin_memory
        # Beside those read ahead: the batch in use, and the one that is fetched while it still is.
        self._slots = [[Slot() for _ in range(prefetch + 2)] for _ in range(workers)]
        self._settings: dict[str, Any] = {"num_workers": workers}
        if workers:
            self._settings |= {
                "prefetch_factor": prefetch,
                "worker_init_fn": _leave_with_parent,
                "multiprocessing_context": "fork",
            }
        state = stream.state_dict()
        self._epoch, self._index = state["epoch"], state["index"]
        self._batches: Iterator[_Parcel | SddError] | None = None

    def __len__(self) -> int:
        return self.stream.batches(self._epoch)

    def __iter__(self) -> Iterator[BatchT]:
        epoch = self._epoch
        if self._batches is None:
            endless = _Endless(self.stream, self._slots, epoch, self._index)
            self._batches = iter(DataLoader(endless, None, **self._settings))
        while self._epoch == epoch:
            parcel = next(self._batches)
            if isinstance(parcel, SddError):
                raise parcel
            batch = parcel.batch
            if parcel.slot is not None:
                worker, number = parcel.slot
                batch = unpacked(batch, self._slots[worker][number])
            if self._pinned:
                batch = {n: v.pin_memory() if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
            self.replaced += batch["replaced"]
            self._epoch, self._index = parcel.following
            yield cast(BatchT, batch)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict() | {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state)
        self._epoch, self._index = int(state["epoch"]), int(state["index"])
        self._batches = None


def _leave_with_parent(_: int) -> None:
    """Ends this worker when the process that started it has gone: PyTorch's own would wait for it to read, forever. And
    not before, when a signal is meant for the whole group: that process may still have a checkpoint to write."""
    os.setpgid(0, 0)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class _Parcel:
    """A batch on its way from a worker. `slot`: (worker, number of its slot) where its tensors lie; `following`: epoch
    and position of the next batch."""

    batch: Columns
    slot: tuple[int, int] | None
    following: tuple[int, int]


class _Endless(IterableDataset[_Parcel | SddError]):
    """A stream through all epochs, so that workers neither stop nor wait between two. An error travels as an item,
    because DataLoader would wrap it in a traceback."""

    def __init__(self, stream: Stream[Any], slots: Sequence[Sequence[Slot]], epoch: int, index: int) -> None:
        self._stream, self._slots, self._epoch, self._index = stream, slots, epoch, index

    def __iter__(self) -> Iterator[_Parcel | SddError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        slots = self._slots[number] if worker else []
        places = itertools.pairwise(self._stream.endless(self._epoch, self._index))
        with Reader(self._stream.plan) as reader:
            for (epoch, start), following in itertools.islice(places, number, None, workers):
                free = next((n for n, slot in enumerate(slots) if slot.take()), None)
                try:
                    if free is None:  # no workers, or someone keeps many batches
                        yield _Parcel(reader.batch(epoch, start), None, following)
                    else:
                        batch = packed(reader.batch(epoch, start, slots[free].empty), slots[free])
                        yield _Parcel(batch, (number, free), following)
                except SddError as error:
                    yield error
                    return


def packed(batch: Columns, slot: Slot) -> Columns:
    """Tensors that lie in the slot become their places."""
    places = {n: slot.place_of(v) for n, v in batch.items() if isinstance(v, torch.Tensor)}
    if "members" in batch:
        places["members"] = dataclasses.replace(batch["members"], data=slot.place_of(batch["members"].data))
    return batch | places


def unpacked(batch: Columns, slot: Slot) -> Columns:
    """Inverse of `packed`. The slot stays taken as long as one of the tensors is there."""
    lease = slot.lease()
    tensors: Columns = {n: tensor_at(v, lease) for n, v in batch.items() if isinstance(v, TensorPlace)}
    members = batch.get("members")
    if members is not None and isinstance(members.data, TensorPlace):
        tensors["members"] = dataclasses.replace(members, data=tensor_at(members.data, lease))
    return batch | tensors
