"""Keeps what a worker holds of a slice within a bound: encoded images beyond it lie in a temporary file until a step
wants them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import IO

from datapipe.schema import Sample
from subject_diffusion.storage import no_room, temporary_file

HELD_BYTES = 256 << 20
"""Encoded images of a slice that a worker holds in memory: 1,000 of 256 KiB."""


class Spilled(bytes):
    """Stands for an image in a file, whose length it has. Its own bytes are not the image's: `loaded` reads those."""

    _place: tuple[IO[bytes], int, int]
    """The file, and in it offset and size in bytes."""

    @classmethod
    def at(cls, file: IO[bytes], offset: int, size: int) -> Spilled:
        found = cls(b"spilled")
        found._place = file, offset, size
        return found

    def __len__(self) -> int:
        return self._place[2]

    def read(self) -> bytes:
        file, offset, size = self._place
        return os.pread(file.fileno(), size, offset)


def loaded(sample: Sample) -> Sample:
    """The sample with its image in memory."""
    return sample.replace(image=sample.image.read()) if isinstance(sample.image, Spilled) else sample


class Spill:
    """The images of one slice. Several threads may call it. Raises RunError where there is no room."""

    def __init__(self, held_bytes: int = HELD_BYTES) -> None:
        self._left = held_bytes
        self._held: dict[int, bytes] = {}
        """By identity, which an object that is held here does not share with another."""
        self._file: IO[bytes] | None = None
        self._changing = threading.Lock()

    def hold(self, image: bytes) -> bytes:
        """The image itself while there is room for it in memory, or what stands for it."""
        with self._changing:
            if isinstance(image, Spilled) or id(image) in self._held or self._has_room(image):
                return image
            try:
                self._file = self._file or temporary_file()
                offset = self._file.seek(0, os.SEEK_END)
                self._file.write(image)
                self._file.flush()
            except OSError as error:
                raise no_room(error) from None
            return Spilled.at(self._file, offset, len(image))

    def hold_at(self, file: IO[bytes], offset: int, size: int) -> bytes:
        """The same for an image that lies in a file already."""
        image = Spilled.at(file, offset, size)
        with self._changing:
            if size > self._left:
                return image
            read = image.read()
            self._has_room(read)
            return read

    def _has_room(self, image: bytes) -> bool:
        """Whether it fits; if so, it is counted."""
        if len(image) > self._left:
            return False
        self._left -= len(image)
        self._held[id(image)] = image
        return True

    def release(self, image: bytes) -> None:
        """Gives the room of an image back that is wanted no more."""
        with self._changing:
            if self._held.pop(id(image), None) is not None:
                self._left += len(image)

    def through(self, step: Callable[[list[Sample]], list[Sample]], samples: Sequence[Sample]) -> list[Sample]:
        """What a step makes of the samples, which it gets with their images in memory."""
        lent = [loaded(sample) for sample in samples]
        return [self._kept(*each) for each in zip(samples, lent, step(lent), strict=True)]

    def _kept(self, before: Sample, lent: Sample, after: Sample) -> Sample:
        if after.image is lent.image:
            return after if lent is before else after.replace(image=before.image)
        if before.image is not None:
            self.release(before.image)
        return after if after.image is None else after.replace(image=self.hold(after.image))
