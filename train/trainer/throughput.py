"""How fast a run is: images/s, in all and by phase, the share of the time that it waits for data, MFU, and memory."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")
Mark = Any
"""A moment: seconds of this machine's clock, or a `torch.cuda.Event` in the GPU's queue."""


class Throughput:
    """Between two looks. MFU: the floating-point operations of the training, counted for one micro-batch (with gradient
    checkpointing, those done twice too), as a share of what a large matrix product reaches on this device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, ranks: int = 1) -> None:
        """ranks: processes that train alike."""
        self._device, self._rate, self._ranks = device, matrix_rate(device, dtype), ranks
        self.flops_per_image = 0.0
        self._spans: dict[str, list[tuple[Mark, Mark]]] = defaultdict(list)
        self.forget()

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

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is computed meanwhile belongs to this phase; the GPU is not waited for."""
        start = self._mark()
        yield
        self._spans[name].append((start, self._mark()))

    def add(self, images: int) -> None:
        """images: of this process."""
        self._images += images

    def look(self) -> dict[str, float]:
        """Since the last one: images/s of all processes, the rest of this one. A phase's images/s are those that there
        would be if there were no other phase."""
        gpu = self._device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._since
        speed = self._images / seconds
        found = {
            "images_per_s": speed * self._ranks,
            "data_wait": self._waited_s / seconds,
            "mfu": speed * self.flops_per_image / self._rate,
        }
        for name, spans in self._spans.items():
            found[f"images_per_s_alone/{name}"] = self._images * self._ranks / sum(_seconds(*span) for span in spans)
        if gpu:
            found["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self.forget()
        return found

    def forget(self) -> None:
        """What has been since the last look, a validation say, does not count."""
        self._images, self._waited_s, self._since = 0, 0.0, time.perf_counter()
        self._spans.clear()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(start: Mark, end: Mark) -> float:
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1000)


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
