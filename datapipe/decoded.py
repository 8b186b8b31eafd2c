"""The stages of an actor see the same images one stage after another; here they are decoded once for all of them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from datapipe.backends.protocol import Pixels
from datapipe.stages.stage import SeesImages, Stage

MOST_BYTES = 1 << 30
"""Pixels that an actor holds beside its micro-batches: 455 images of 1024 x 768. Others are decoded in each stage."""


@contextmanager
def decoded_once(stages: Sequence[Stage], most_bytes: int = MOST_BYTES) -> Iterator[None]:
    """Within the block, which is for one slice, an image that several of the stages look at is decoded by the first."""
    looking = [stage for stage in stages if isinstance(stage, SeesImages)]
    if len(looking) < 2:
        yield
        return
    held = _Held(looking[0].decode, most_bytes)
    for stage in looking:
        stage.decode = held
    try:
        yield
    finally:
        for stage in looking:
            del stage.decode


class _Held:
    """A decoder that holds what it returned, until it holds `most_bytes`. Several threads may call it."""

    def __init__(self, decode: Callable[[bytes], Pixels], most_bytes: int) -> None:
        self._decode = decode
        self._left = most_bytes
        self._found: dict[bytes, Pixels] = {}
        """By the hash of the encoded image: of one that lies in a file, each stage reads a copy of its own."""
        self._changing = threading.Lock()

    def __call__(self, data: bytes) -> Pixels:
        key = hashlib.sha256(data).digest()
        if (found := self._found.get(key)) is not None:
            return found
        pixels = self._decode(data)
        # What is held is never given up for another image: each stage sees all images of a slice before the next one
        # does, and so would always come for those that were given up.
        with self._changing:
            if pixels.nbytes <= self._left:
                self._left -= pixels.nbytes
                self._found[key] = pixels
        return pixels
