"""Which format some labels are in, by what their path holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datapipe.formats.coco import read_coco
from datapipe.formats.cvat import read_cvat
from datapipe.formats.label_studio import read_label_studio
from datapipe.formats.labels import Faults, LabeledImage
from datapipe.formats.openimages import read_openimages
from datapipe.formats.voc import read_voc, voc_masks
from datapipe.formats.yolo import read_yolo, yolo_label_files
from subject_diffusion.errors import SourceError


def read_labels(
    labels: Path,
    images: Path,
    faults: Faults,
    captions: Path | None = None,
    classes: Path | None = None,
    masks: Path | None = None,
) -> tuple[Iterator[LabeledImage], list[Path]]:
    """The labeled images, and the files that the labels are in. Raises SourceError."""
    given = [path for path in (captions, classes, masks) if path is not None]
    if labels.is_dir():
        if found := sorted(labels.rglob("*.xml")):
            return read_voc(found, images, faults), [*found, *voc_masks(found), *given]
        if found := yolo_label_files(labels):
            return read_yolo(labels, images, faults, classes), [*found, *given]
        raise SourceError(f"{labels}: neither XML files of Pascal VOC nor text files of YOLO in it; check the path")
    match labels.suffix.lower():
        case ".yaml" | ".yml":
            found = yolo_label_files(labels.parent)
            return read_yolo(labels, images, faults, classes), [labels, *found, *given]
        case ".xml":
            return read_cvat(labels, images, faults), [labels, *given]
        case ".csv":
            if classes is None:
                raise SourceError(f"{labels}: Open Images' boxes need their class descriptions, --classes FILE.csv")
            return read_openimages(labels, classes, images, faults, masks), [labels, *given]
        case ".json":
            rows = (
                read_label_studio(labels, images, faults)
                if _is_list(labels)
                else read_coco(labels, images, faults, captions)
            )
            return rows, [labels, *given]
    raise SourceError(
        f"{labels}: labels are a .json (COCO, Label Studio), a .csv (Open Images), an .xml (CVAT), a data.yaml (YOLO), "
        "or a folder of .xml (Pascal VOC) or .txt files (YOLO); unpack archives first"
    )


def _is_list(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
