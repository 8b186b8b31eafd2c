"""Masks as COCO's run-length encoding, the form in which they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask


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
        """The encoding that pycocotools takes. Raises ValueError when the counts are not ASCII."""
        return {"size": list(self.size), "counts": self.counts.encode("ascii")}

    def array(self) -> NDArray[np.bool_]:
        """The mask (H, W). Raises ValueError when pycocotools refuses the counts."""
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
