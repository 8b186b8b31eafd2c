"""From shards to a trained model."""

from train.index import Filter
from train.loader import StreamLoader
from train.reader import Replaced, Source
from train.sample import CorruptSampleError, RawSample
from train.stream import Stream
from train.transform import SubjectTransform

__all__ = [
    "CorruptSampleError",
    "Filter",
    "RawSample",
    "Replaced",
    "Source",
    "Stream",
    "StreamLoader",
    "SubjectTransform",
]
