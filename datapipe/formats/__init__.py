"""Other tools' formats: labels of images that become shards, and shards that become files of theirs. Each format is one
module, which reads, writes, or both."""

from collections.abc import Callable, Iterator

from datapipe.formats.ai_toolkit import write_ai_toolkit
from datapipe.formats.coco import write_coco
from datapipe.formats.diffsynth import write_diffsynth
from datapipe.formats.flux3 import write_flux3
from datapipe.formats.hf import write_hf
from datapipe.formats.ideogram4 import write_ideogram4
from datapipe.formats.labels import Faults, LabeledImage, LabeledObject, digest_of
from datapipe.formats.musubi import write_musubi
from datapipe.formats.parquet import write_parquet
from datapipe.formats.recognize import read_labels
from datapipe.formats.simpletuner import write_simpletuner
from datapipe.formats.webshart import write_webshart
from datapipe.formats.yolo import write_yolo
from datapipe.shards import Manifest, Store

__all__ = ["WRITERS", "Faults", "LabeledImage", "LabeledObject", "digest_of", "read_labels"]

WRITERS: dict[str, Callable[[Store, str, Faults], Iterator[Manifest]]] = {
    "ai-toolkit": write_ai_toolkit,
    "coco": write_coco,
    "diffsynth": write_diffsynth,
    "flux3": write_flux3,
    "hf": write_hf,
    "ideogram4": write_ideogram4,
    "musubi": write_musubi,
    "parquet": write_parquet,
    "simpletuner": write_simpletuner,
    "webshart": write_webshart,
    "yolo": write_yolo,
}
"""What `sdd export --to` knows: each writes a dataset into a folder or bucket, counts what it leaves out, and yields
the shards as they are done."""
