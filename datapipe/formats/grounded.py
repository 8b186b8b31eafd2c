"""Captions that say where each subject is, for models that were trained on such."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from datapipe.formats.folder import new_folder
from datapipe.formats.kept import each_kept
from datapipe.formats.labels import Faults
from datapipe.schema import Entity, Sample
from datapipe.shards import Manifest, Store

GRID = 1000
"""Width and height of the canvas that boxes are told on, whatever the image's."""
METADATA_FILE = "metadata.jsonl"


def write_grounded(store: Store, out: str, faults: Faults, caption: Callable[[Sample], str]) -> Iterator[Manifest]:
    """Writes `KEY.jpg` and its caption, `KEY.txt`, into the folder `out`, and last `metadata.jsonl`, by which
    `datasets` loads both as an image folder."""
    with new_folder(out) as folder, folder.lines(METADATA_FILE) as add:

        def write(sample: Sample) -> None:
            assert sample.image is not None
            text = caption(sample)
            image = folder.put(f"{sample.key}.jpg", sample.image)
            folder.put(f"{sample.key}.txt", text.encode())
            add({"file_name": image, "text": text})

        yield from each_kept(store, faults, write)


def grid_box(entity: Entity, width: int, height: int) -> list[int]:
    """y_min, x_min, y_max, x_max on the grid. Each side is of 2 units at least: readers take boxes of zeros and ones
    for fractions, and none may be empty."""
    x1, y1, x2, y2 = entity.box
    (left, right), (top, bottom) = _ends(x1 / width, x2 / width), _ends(y1 / height, y2 / height)
    return [top, left, bottom, right]


def description(entity: Entity) -> str:
    """What the subject looks like, where a stage described it, else what it is."""
    return in_one_line(entity.desc or entity.tag)


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def _ends(low: float, high: float) -> tuple[int, int]:
    first = min(round(low * GRID), GRID - 2)
    return first, max(round(high * GRID), first + 2)
