"""Other tools' formats: labels of images that become shards, and shards that become files of theirs. Each format is one
module, which reads, writes, or both."""

from datapipe.formats.coco import write_coco
from datapipe.formats.labels import Faults, LabeledImage, LabeledObject, digest_of
from datapipe.formats.parquet import write_parquet
from datapipe.formats.recognize import read_labels
from datapipe.formats.yolo import write_yolo

__all__ = [
    "Faults",
    "LabeledImage",
    "LabeledObject",
    "digest_of",
    "read_labels",
    "write_coco",
    "write_parquet",
    "write_yolo",
]
