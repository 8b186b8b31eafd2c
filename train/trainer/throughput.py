"""How fast a run is: images/s, the share of the time that it waits for data, and MFU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")


class Throughput:
    """Between two looks. MFU: the floating-point operations of the training, counted for one micro-batch (with gradient
    checkpointing, those done twice too), as a share of what a large matrix product reaches on this device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, ranks: int = 1) -> None:
        """ranks: processes that train alike."""
        self._rate, self._ranks = matrix_rate(device, dtype), ranks
        self.flops_per_image = 0.0
        self._images, self._waited_s, self._since = 0, 0.0, time.perf_counter()

    def count(self, compute: Callable[[], object], images: int) -> None:
        """Counts the operations of one micro-batch, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            compute()
        self.flops_per_image = counter.get_total_flops() / images

    def waiting(self, get: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = get()
        self._waited_s += time.perf_counter() - started
        return result

    def add(self, images: int) -> None:
        """images: of this process."""
        self._images += images

    def look(self) -> dict[str, float]:
        """Since the last one: images/s of all processes, the rest of this one."""
        seconds = time.perf_counter() - self._since
        speed = self._images / seconds
        found = {
            "images_per_s": speed * self._ranks,
            "data_wait": self._waited_s / seconds,
            "mfu": speed * self.flops_per_image / self._rate,
        }
        self.forget()
        return found

    def forget(self) -> None:
        """What has been since the last look, a validation say, does not count."""
        self._images, self._waited_s, self._since = 0, 0.0, time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, the best of several."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
