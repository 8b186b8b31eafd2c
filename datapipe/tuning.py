"""How a model labels fastest, found by trying: how many images at once, until memory or the gain runs out, and whether
compiled."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

WORTH_IT = 1.05
"""A batch of twice the size must label this many times as many images per second."""
MOST = 256
"""The largest batch that is tried. Beyond it the GPU waits long for the first batch of a slice."""


@dataclass(frozen=True)
class Speed:
    """`batch`: images at once; `images_per_s`: reached with them."""

    batch: int
    images_per_s: float


def find_batch(
    attempt: Callable[[int], object], most: int = MOST, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """Doubles the batch, from one image on, until it exhausts the GPU's memory, is no longer worth it, or would be more
    than `most`; returns the last one that was worth it.

    attempt: labels a batch of so many images. What it raises is raised here, unless it is a lack of memory for more
    than one image.
    """
    best = measure(attempt, 1, clock)
    while 2 * best.batch <= most:
        try:
            larger = measure(attempt, 2 * best.batch, clock)
        except Exception as error:
            if not frees_memory(error):
                raise
            break
        if larger.images_per_s < WORTH_IT * best.images_per_s:
            break
        best = larger
    return best


def compiling_pays(plain: Speed, compiled: Speed, took_s: float, rows: int) -> bool:
    """Whether `rows` images end earlier with a model that is compiled first, in `took_s` seconds."""
    return rows / plain.images_per_s > took_s + rows / compiled.images_per_s


def measure(attempt: Callable[[int], object], batch: int, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """The better of two attempts, after one that does not count: in it kernels are chosen, and memory is claimed."""
    attempt(batch)
    took: list[float] = []
    for _ in range(2):
        started = clock()
        attempt(batch)
        took.append(clock() - started)
    return Speed(batch, batch / max(min(took), 1e-9))


def frees_memory(error: Exception) -> bool:
    """Whether the error says that a GPU's memory is exhausted. If so, the tensors of the batch that did not fit are
    forgotten, and the memory that PyTorch keeps in reserve is given back, so that a smaller batch finds room."""
    if type(error).__name__ != "OutOfMemoryError":
        return False
    # The functions that failed still hold their tensors for whoever would look at the traceback.
    traceback.clear_frames(error.__traceback__)
    sys.modules["torch"].cuda.empty_cache()
    return True
