"""Masks as COCO's run-length encoding, the form in which they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

MAX_PIXELS = 170_000_000
"""The most pixels of any image or mask that is read."""
_MOST_CHARACTERS = 7
"""The most characters of one number, which has up to 32 bits."""


@dataclass(frozen=True)
class RLE:
    """COCO run-length encoding of a mask. `size`: (height, width) pixels; `counts`: pycocotools' compressed ASCII."""

    size: tuple[int, int]
    counts: str

    @classmethod
    def of(cls, mask: NDArray[Any]) -> RLE:
        """The encoding of a mask (H, W); every nonzero pixel is inside."""
        return cls.from_coco(coco_mask.encode(np.asfortranarray(mask != 0, np.uint8)))

    @classmethod
    def from_coco(cls, encoded: dict[str, Any]) -> RLE:
        """The encoding that pycocotools returns, whose counts are bytes."""
        height, width = encoded["size"]
        return cls((int(height), int(width)), encoded["counts"].decode("ascii"))

    def to_coco(self) -> dict[str, Any]:
        """The encoding that pycocotools takes, which believes all of it: from what lies about its size, or ends early,
        it reads and writes past its own memory. Raises ValueError for such a one."""
        height, width = self.size
        if not (0 < height <= MAX_PIXELS and 0 < width <= MAX_PIXELS and height * width <= MAX_PIXELS):
            raise ValueError(f"a mask of {width} x {height} pixels")
        if self.runs().sum() != height * width:
            raise ValueError(f"run lengths that do not fill {width} x {height} pixels")
        return {"size": [height, width], "counts": self.counts.encode("ascii")}

    def is_whole(self) -> bool:
        """Whether the counts are run lengths that fill the size."""
        try:
            self.to_coco()
        except ValueError:
            return False
        return True

    def runs(self) -> NDArray[np.int64]:
        """(N,) the lengths of the runs, outside and inside in turn, in no order. Raises ValueError where the counts are
        none.

        Each number is written in characters of five bits, least significant first, where bit 6 says that more follow;
        from the fourth on it is the difference to the run length two before.
        """
        digits = np.frombuffer(self.counts.encode("ascii"), np.uint8).astype(np.int64) - 48
        if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
            raise ValueError("no run lengths")
        ends = np.flatnonzero(digits < 32)
        lengths = np.diff(ends, prepend=-1)
        if lengths.max() > _MOST_CHARACTERS:
            raise ValueError("a run length of more than 32 bits")
        exponents = 5 * (np.arange(len(digits)) - np.repeat(ends - lengths + 1, lengths))
        numbers = np.add.reduceat((digits & 31) << exponents, ends - lengths + 1)
        numbers -= np.where(digits[ends] & 16, 1 << 5 * lengths, 0)
        runs: NDArray[np.int64] = np.concatenate([numbers[:1], np.cumsum(numbers[1::2]), np.cumsum(numbers[2::2])])
        if runs.min() < 0 or runs.max() > MAX_PIXELS:
            raise ValueError("run lengths that no image has")
        return runs

    def array(self) -> NDArray[np.bool_]:
        """The mask (H, W). Raises ValueError as `to_coco` does."""
        decoded: NDArray[np.uint8] = coco_mask.decode(self.to_coco())
        return decoded.astype(bool)

    def area_within(self, box: tuple[float, float, float, float]) -> int:
        """Number of pixels inside that also lie in a box (x1, y1, x2, y2), whose corners are cut to whole pixels."""
        height, width = self.size
        x1, x2 = (min(max(int(x), 0), width) for x in (box[0], box[2]))
        y1, y2 = (min(max(int(y), 0), height) for y in (box[1], box[3]))
        columns, rows = x2 - x1, y2 - y1
        if columns <= 0 or rows <= 0:
            return 0
        # Runs go down the columns, outside and inside in turn.
        runs = [x1 * height + y1, rows, *[height - rows, rows] * (columns - 1)]
        runs.append(height * width - sum(runs))
        filled = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        return int(coco_mask.area(coco_mask.merge([self.to_coco(), filled], intersect=True)))

    @property
    def area(self) -> int:
        """Number of pixels inside."""
        return int(coco_mask.area(self.to_coco()))
