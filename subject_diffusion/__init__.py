"""Label images, read datasets, stream them into training, and draw subjects.

    from PIL import Image
    from subject_diffusion import label

    sample = label(Image.open("photo.jpg"), recipe="sdd")
    print(sample.caption)
    for entity in sample.entities:
        print(entity.tag, entity.box, entity.mask.array().sum())

Names are imported when they are first used, so `import subject_diffusion` alone loads no model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from subject_diffusion._clash import refuse_foreign_packages
from subject_diffusion._extras import help_for

if TYPE_CHECKING:
    from datapipe.schema import Entity, Sample
    from model import Subject, SubjectDiffusionPipeline
    from subject_diffusion.errors import SddError
    from subject_diffusion.labeling import Labeler, label
    from subject_diffusion.reading import open_dataset, read_samples
    from train import Buckets, Filter, Source, Stream, StreamLoader, SubjectTransform

__all__ = [
    "Buckets",
    "Entity",
    "Filter",
    "Labeler",
    "Sample",
    "SddError",
    "Source",
    "Stream",
    "StreamLoader",
    "Subject",
    "SubjectDiffusionPipeline",
    "SubjectTransform",
    "label",
    "open_dataset",
    "read_samples",
]

refuse_foreign_packages()

_HOMES = {
    "datapipe.schema": ("Entity", "Sample"),
    "model": ("Subject", "SubjectDiffusionPipeline"),
    "subject_diffusion.errors": ("SddError",),
    "subject_diffusion.labeling": ("Labeler", "label"),
    "subject_diffusion.reading": ("open_dataset", "read_samples"),
    "train": ("Buckets", "Filter", "Source", "Stream", "StreamLoader", "SubjectTransform"),
}
_EXTRA_OF = {"subject_diffusion.labeling": "label", "train": "stream"}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    except ModuleNotFoundError as error:
        line = help_for(error, _EXTRA_OF.get(_HOME_OF[name], "train"))
        if line is None:
            raise
        raise ModuleNotFoundError(line, name=error.name) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
