"""What a stage is, and how one comes from its block of a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from datapipe.decoding import decode_rgb
from datapipe.schema import Sample, StageName
from subject_diffusion.settings import Settings

Phase = Literal["fetch", "annotate"]
"""`fetch` ends with raw shards, `annotate` with shards."""


class Stage(Protocol):
    """One step over samples, as a plain object that knows no Ray, no path and no clock."""

    name: StageName
    micro_batch: int
    """The most samples that one call takes."""

    def bucket(self, sample: Sample) -> object:
        """Samples of one bucket may share a micro-batch (for example, images of the same padded size)."""

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples in the same order, each further on or with a verdict."""


class Overlapping:
    """Marks a stage that several threads may call at once, so that decoding, resizing and encoding go on while another
    micro-batch has the model. The stage sees to it that one has the model at a time."""


class WaitsForTheLast:
    """Marks a stage that works at many rows of a micro-batch at once and, towards its end, at few. `tail_s`: seconds
    that its calls took beyond those of as many rows at the speed of the first nine tenths."""

    tail_s: float = 0.0


class SeesKept:
    """Marks a stage for what is kept: it sees the rows with that verdict, and all others those that have none yet."""


def is_due(stage: Stage, sample: Sample) -> bool:
    """Whether the stage has something to do with the sample."""
    return sample.is_kept if isinstance(stage, SeesKept) else sample.verdict is None


class Compilable(ABC):
    """Marks a stage whose model torch.compile can make faster. Its settings are `CompilableSettings`."""

    @abstractmethod
    def compile(self) -> None:
        """The model is compiled in its next call, which takes a minute or more."""


class SeesImages:
    """Marks a stage that looks at pixels. It asks `decode` for them, (H, W, 3) uint8 sRGB of the encoded image, which
    may be another stage's too: they must not be written to."""

    decode: Callable[[bytes], NDArray[np.uint8]] = staticmethod(decode_rgb)


class StageSettings(Settings, ABC):
    """A stage's block of the recipe. A run asks it for everything that it must know of the stage.

    `identity()`, inherited, gives the settings that decide what is written; mark the others `EXECUTION_ONLY`.
    """

    phase: ClassVar[Phase] = "annotate"

    @abstractmethod
    def build(self) -> Stage:
        """The stage, with its model loaded."""

    def check(self) -> None:
        """Makes sure, cheaply and before any work, that the stage can be built. Raises BackendError."""

    def pinned(self) -> Self:
        """The settings with the revision of their model resolved to a commit, if it has one. Raises BackendError."""
        return self

    def model_used(self) -> str | None:
        """The model that a shard's manifest names for this stage, such as "id@revision"; None: the stage has none."""
        return None
