"""Which samples of a dataset, and which of their entities, a stream gives: judged by the sidecars, without the tars."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from datapipe.schema import Entity
from subject_diffusion.settings import Settings, StringSet


class Filter(Settings):
    """Which samples, and which of their entities, a stream gives. Needs the sidecars that `sdd dataset` writes."""

    min_score: float = Field(0.0, ge=0, le=1)
    """Entities with a lower score are left out."""
    tags: StringSet | None = None
    """Entities with other tags are left out; default: every tag is wanted."""
    without_tags: StringSet = frozenset()
    """Images with an entity of such a tag are left out."""
    min_entities: int = Field(0, ge=0)
    """Images with fewer entities (of those wanted) are left out."""
    max_entities: int | None = Field(None, ge=1)
    """Images with more are left out; default: no limit."""
    min_side_px: int = Field(0, ge=0)
    """Images with a shorter side are left out."""

    def entities(self, entities: Sequence[Entity]) -> tuple[Entity, ...]:
        """Those that are wanted."""
        return tuple(e for e in entities if e.score >= self.min_score and (self.tags is None or e.tag in self.tags))

    @property
    def fingerprint(self) -> str:
        wanted = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in self}
        return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:8]

    @property
    def looks_at_entities(self) -> bool:
        return self != Filter(min_side_px=self.min_side_px)

    def keeps(self, sidecar: pa.Table) -> NDArray[np.bool_]:
        """(N,) which rows of a sidecar are wanted. Rows without members in the tar never are."""
        kept: NDArray[np.bool_] = sidecar["image_offset"].is_valid().to_numpy()
        sides = np.minimum(sidecar["width"].to_numpy(), sidecar["height"].to_numpy())
        kept &= sides >= self.min_side_px
        if not self.looks_at_entities:
            return kept
        candidates = sidecar["candidates"].combine_chunks()
        rows = pc.list_parent_indices(candidates).to_numpy()
        tag, score, rejected = (candidates.flatten().field(name) for name in ("tag", "score", "rejected"))
        entity = rejected.is_null().to_numpy(zero_copy_only=False)
        unwanted = entity & pc.is_in(tag, pa.array(sorted(self.without_tags), pa.string())).to_numpy(False)
        wanted = entity & (score.to_numpy(zero_copy_only=False) >= self.min_score)
        if self.tags is not None:
            wanted &= pc.is_in(tag, pa.array(sorted(self.tags), pa.string())).to_numpy(False)
        count = np.bincount(rows[wanted], minlength=len(kept))
        kept &= np.bincount(rows[unwanted], minlength=len(kept)) == 0
        kept &= (count >= self.min_entities) & (count <= (self.max_entities or np.inf))
        return kept
