"""Memory through which worker processes hand batches to their parent.

PyTorch gives every tensor of every batch fresh shared memory, and touching that for the first time costs more than
reading the data. Here each worker has a few slots that it fills again and again: one is free again when the parent has
let go of the batch that lies in it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

SLOT_BYTES = 256 << 20
"""Reserved per slot; only what a batch fills becomes memory. A larger batch goes PyTorch's way."""

_Lease = ctypes.c_char * SLOT_BYTES
"""A ctypes buffer, because NumPy would keep what lies behind a memoryview and let go of the view itself."""

_ALIGNMENT = 64
_FREE, _TAKEN = 0, 1


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a slot: offset in bytes, shape, strides in bytes, NumPy's name of its type."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class Slot:
    """Anonymous memory shared with the processes that are forked after it is made. Its first byte says whether it is
    taken."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SLOT_BYTES)
        self._start = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._used = 0

    def take(self) -> bool:
        """For the worker: whether the slot was free and is now its to fill."""
        if self._memory[0] == _TAKEN:
            return False
        self._memory[0] = _TAKEN
        self._used = _ALIGNMENT
        return True

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[np.generic]:
        """An array in the slot; in memory of its own where the slot is full."""
        offset = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        if end > SLOT_BYTES:
            return np.empty(shape, dtype)
        self._used = end
        return np.ndarray(shape, dtype, self._memory, offset)

    def place_of(self, tensor: torch.Tensor) -> TensorPlace | torch.Tensor:
        """Where a tensor lies; the tensor itself, to be sent as it is, when that is not here."""
        array = tensor.numpy()
        offset = array.ctypes.data - self._start
        inside = 0 <= offset < SLOT_BYTES
        return TensorPlace(offset, array.shape, array.strides, array.dtype.str) if inside else tensor

    def lease(self) -> Any:
        """For the parent: the slot's memory, as a buffer; the slot is free again when nothing refers to it any more."""
        lease = _Lease.from_buffer(self._memory)
        weakref.finalize(lease, self._memory.__setitem__, 0, _FREE).atexit = False
        return lease


def tensor_at(place: TensorPlace, lease: Any) -> torch.Tensor:
    """The tensor, without a copy. It holds the lease."""
    array: NDArray[np.generic] = np.ndarray(place.shape, place.dtype, lease, place.offset, place.strides)
    return torch.from_numpy(array)
