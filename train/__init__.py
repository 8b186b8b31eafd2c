"""From shards to a trained model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.stream.buckets import Buckets
    from train.stream.dataset import Stream
    from train.stream.filter import Filter
    from train.stream.loader import StreamLoader
    from train.stream.reader import RawBatch, Replaced
    from train.stream.source import Source
    from train.stream.tar_sample import CorruptSampleError, RawSample
    from train.stream.transform import SubjectBatch, SubjectTransform

__all__ = [
    "Buckets",
    "CorruptSampleError",
    "Filter",
    "RawBatch",
    "RawSample",
    "Replaced",
    "Source",
    "Stream",
    "StreamLoader",
    "SubjectBatch",
    "SubjectTransform",
]

_MODULES = {
    "Buckets": "buckets",
    "CorruptSampleError": "tar_sample",
    "Filter": "filter",
    "RawBatch": "reader",
    "RawSample": "tar_sample",
    "Replaced": "reader",
    "Source": "source",
    "Stream": "dataset",
    "StreamLoader": "loader",
    "SubjectBatch": "transform",
    "SubjectTransform": "transform",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which a command that has been mistyped should not cost.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"train.stream.{_MODULES[name]}"), name)
