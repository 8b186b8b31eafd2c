"""YOLO's folders: a text file of boxes or polygons beside each image, and a list of the classes' names."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from datapipe.formats.folder import new_folder
from datapipe.formats.labels import (
    Corners,
    Faults,
    LabeledImage,
    LabeledObject,
    around,
    files_below,
    polygons_mask,
    spoken,
    text_file,
)
from datapipe.image_file import upright_size
from datapipe.schema import Entity, Sample
from datapipe.shards import Manifest, Store, kept_of, manifests
from datapipe.sources.folders import image_files
from datapipe.sources.path_table import path_table
from subject_diffusion.errors import SourceError, one_line

NAME_FILES = ("data.yaml", "dataset.yaml", "classes.txt", "obj.names", "_darknet.labels")
"""Where tools write the classes' names, in the folder of the labels or the one above."""

TRAIN_LIST, VALIDATION_LIST = "train.txt", "val.txt"
IMAGE_LISTS = (TRAIN_LIST, VALIDATION_LIST, "test.txt")
"""Where tools list the images of each part, in the folder of `data.yaml`."""

VALIDATION_EVERY = 10
"""Images: every tenth one is for validation, which Ultralytics cannot do without."""

_MOST_PARTS = 100
"""Parts of a mask that are joined, the largest first: the others are specks, and joining thousands takes minutes."""


def read_yolo(
    labels: Path, files: Iterable[Path], images: Path, faults: Faults, classes: Path | None = None
) -> Iterator[LabeledImage]:
    """Reads images in the order of their paths.

    labels: the folder of the label files, or `data.yaml`; files: the label files in it; classes: the names, one a line,
    or a YAML file with `names`; default: looked for in the labels' folder and the one above. The labels of
    `images/a/b.jpg` lie at `a/b.txt` below the labels' folder, at the same path with `labels` in place of `images`, or
    beside the image. A line that is broken costs itself. Raises SourceError.
    """
    root = labels if labels.is_dir() else labels.parent
    names, keypoints = _names(classes or (labels if labels.is_file() else _name_file(root)))
    with path_table() as used:
        for image in image_files(str(images)):
            name = os.fsdecode(image.name)
            path = images / name
            label_file = next((p for p in _label_files(root, images, name) if p.is_file()), None)
            if label_file is None:
                faults.add("image without a file of labels", name)
                yield LabeledImage(path, name)
                continue
            used.add([str(label_file.resolve())])
            size_px = upright_size(path)
            if size_px is None:  # its own verdict says what is wrong with it
                yield LabeledImage(path, name)
                continue
            yield LabeledImage(path, name, tuple(_objects(label_file, names, keypoints, size_px, faults)))
        for path in files:
            if str(path.resolve()) not in used:
                faults.add("file of labels without an image", str(path))


def write_yolo(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes `images/KEY.jpg`, their polygons in `labels/KEY.txt`, the lists `train.txt` and `val.txt`, and `data.yaml`
    into the folder `out`, as Ultralytics trains on them; yields the shards as they are done.

    Tags become classes. An entity without a mask is written as the rectangle of its box, because Ultralytics refuses
    files that mix boxes and polygons. Captions and scores have no place there.
    """
    classes: dict[str, int] = {}
    written = 0
    with new_folder(out) as folder:
        with folder.writing(TRAIN_LIST) as train, folder.writing(VALIDATION_LIST) as validation:
            for manifest in manifests(store, "shard"):
                for sample in kept_of(store, manifest, faults.corrupt):
                    assert sample.image is not None
                    image = folder.put(f"images/{sample.key}.jpg", sample.image)
                    folder.put(f"labels/{sample.key}.txt", "".join(_lines(sample, classes)).encode())
                    (train if written % VALIDATION_EVERY else validation).write(f"./{image}\n".encode())
                    written += 1
                yield manifest
        # Without `path`, places are relative to this file, and the folder may be moved.
        tree = {"train": TRAIN_LIST, "val": VALIDATION_LIST, "names": {n: name for name, n in classes.items()}}
        folder.put("data.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode())


def yolo_label_files(root: Path) -> Iterator[Path]:
    """The label files below a folder, in no order."""
    others = {root / name for name in IMAGE_LISTS}
    found = (p for p in files_below(root, ".txt") if p.name not in NAME_FILES and not p.name.startswith("."))
    return (p for p in found if p not in others)


def _objects(
    path: Path, names: dict[int, str], keypoints: bool, size_px: tuple[int, int], faults: Faults
) -> Iterator[LabeledObject]:
    for number, line in enumerate(text_file(path).splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            values = [float(v) for v in line.split()]
            if len(values) < 5 or not all(map(math.isfinite, values)):
                raise ValueError(line)
        except ValueError:
            faults.add("line that is no box or polygon", f"{where}: {line.strip()[:60]!r}")
            continue
        name = spoken(names.get(int(values[0]), "")) if values[0].is_integer() else ""
        if not name:
            faults.add("annotation of an unknown or nameless class", f"{where}: {values[0]:g}")
            continue
        is_polygon = len(values) >= 7 and len(values) % 2 == 1 and not keypoints
        if is_polygon:
            width, height = size_px
            points = [v * side for v, side in zip(values[1:], (width, height) * (len(values) // 2), strict=True)]
            yield LabeledObject(name, around(values[1:]), polygons_mask([points], width, height), where=where)
        else:  # beyond the box: a confidence, or keypoints
            yield LabeledObject(name, _corners(values[1:5]), where=where)


def _corners(center: Sequence[float]) -> Corners:
    x, y, width, height = center
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _label_files(root: Path, images: Path, name: str) -> Iterator[Path]:
    """Where an image's labels may lie. Tools agree on no place."""
    text = Path(name).with_suffix(".txt")
    yield root / text
    yield root / "labels" / text
    path = Path(os.path.abspath(images / text))
    parts = list(path.parts)
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        yield Path(*parts[:last], "labels", *parts[last + 1 :])
    yield path


def _name_file(root: Path) -> Path:
    for folder in (root, root.parent, root.parent.parent):
        for name in NAME_FILES:
            if (folder / name).is_file():
                return folder / name
    raise SourceError(
        f"{root}: no {', '.join(NAME_FILES)} there or above; YOLO's labels are numbers, so give their names' "
        "file with --classes"
    )


def _names(path: Path) -> tuple[dict[int, str], bool]:
    """The classes' names by number, and whether the labels hold keypoints."""
    text = text_file(path)
    if path.suffix not in (".yaml", ".yml"):
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip())), False
    try:
        tree: Any = yaml.safe_load(text)
        names = tree["names"]
        listed = names.items() if isinstance(names, dict) else enumerate(names)
        # As a text, a list of lists that YAML's aliases repeat would be longer than memory.
        if any(isinstance(name, list | dict) for name in (names.values() if isinstance(names, dict) else names)):
            raise ValueError("a name that is a list")
        return {int(number): str(name) for number, name in listed}, "kpt_shape" in tree
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{path}: no list of `names` in it ({one_line(error)}); name another with --classes"
        ) from None


def _lines(sample: Sample, classes: dict[str, int]) -> Iterator[str]:
    """One for each entity: its class, then x and y of each corner as fractions. `classes`: numbers by tag; new tags are
    added."""
    for entity in sample.entities:
        corners = _polygon(entity) / (sample.width, sample.height)
        numbers = " ".join(f"{v:.6f}" for v in corners.clip(0, 1).flat)
        yield f"{classes.setdefault(entity.tag, len(classes))} {numbers}\n"


def _polygon(entity: Entity) -> NDArray[np.float64]:
    """(N, 2) x and y in pixels: the outline of the mask, or the corners of the box where there is none."""
    if entity.mask is not None:
        outline = _outline(entity.mask.array())
        if len(outline) > 2:
            return outline.astype(np.float64) + 0.5  # from the pixels' numbers to their centers
    x1, y1, x2, y2 = entity.box
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """(N, 2) x and y of border pixels of a mask (H, W), in one closed line.

    YOLO has one polygon for an object. Parts that lie apart, and holes, are joined to it by a line there and back,
    which encloses nothing.
    """
    found, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    outline = np.empty((0, 2), np.int32)
    parts = sorted((contour[:, 0] for contour in found), key=cv2.contourArea, reverse=True)
    for part in parts[:_MOST_PARTS]:
        at = int(np.abs(outline - part[0]).sum(axis=1).argmin()) if len(outline) else 0
        outline = np.concatenate([outline[: at + 1], part, part[:1], outline[at:]])
    return outline
