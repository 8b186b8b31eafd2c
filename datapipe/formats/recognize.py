"""Which format some labels are in, by what their path holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datapipe.formats.coco import read_coco
from datapipe.formats.cvat import read_cvat
from datapipe.formats.label_studio import read_label_studio
from datapipe.formats.labels import Faults, LabeledImage, files_below
from datapipe.formats.openimages import read_openimages
from datapipe.formats.voc import read_voc, voc_masks
from datapipe.formats.yolo import read_yolo, yolo_label_files
from datapipe.sources.path_table import PathTable, path_table
from datapipe.sources.scanning import shown
from subject_diffusion.errors import SourceError


@contextmanager
def read_labels(
    labels: Path,
    images: Path,
    faults: Faults,
    captions: Path | None = None,
    classes: Path | None = None,
    masks: Path | None = None,
) -> Iterator[tuple[Iterator[LabeledImage], Iterable[Path]]]:
    """The labeled images, and the files that the labels are in. Raises SourceError."""
    given = [path for path in (captions, classes, masks) if path is not None]
    suffix = labels.suffix.lower()
    with path_table() as table:
        files = _Paths(table)
        if labels.is_dir():
            table.add(map(str, shown(files_below(labels, ".xml"), "files of labels found")))
            if table:
                yield read_voc(files, images, faults), itertools.chain(files, voc_masks(files), given)
                return
        if labels.is_dir() or suffix in (".yaml", ".yml"):
            root, own = (labels, []) if labels.is_dir() else (labels.parent, [labels])
            table.add(map(str, shown(yolo_label_files(root), "files of labels found")))
            if not own and not table:
                raise SourceError(
                    f"{labels}: neither XML files of Pascal VOC nor text files of YOLO in it; check the path"
                )
            yield read_yolo(labels, files, images, faults, classes), itertools.chain(own, files, given)
            return
    yield _of_one_file(labels, images, faults, captions, classes, masks), [labels, *given]


@dataclass(frozen=True)
class _Paths:
    table: PathTable

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.table)


def _of_one_file(
    labels: Path, images: Path, faults: Faults, captions: Path | None, classes: Path | None, masks: Path | None
) -> Iterator[LabeledImage]:
    match labels.suffix.lower():
        case ".xml":
            return read_cvat(labels, images, faults)
        case ".csv":
            if classes is None:
                raise SourceError(f"{labels}: Open Images' boxes need their class descriptions, --classes FILE.csv")
            return read_openimages(labels, classes, images, faults, masks)
        case ".json" if _is_list(labels):
            return read_label_studio(labels, images, faults)
        case ".json":
            return read_coco(labels, images, faults, captions)
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
