"""What a stream reads from."""

from __future__ import annotations

from dataclasses import dataclass, field

from datapipe.sources.tar_keys import KeyRule
from train.stream.filter import Filter


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture. `path`: see `shard_index.open_index`. Either every source has a `weight`, its share of
    the samples, or each comes `epochs` times in an epoch of the mixture. `key_rule`: where the keys of a foreign tar's
    members end, at the first dot of a file name, as in WebDataset, or at the last; auto: the first, unless images of
    different samples would share a key in that tar."""

    path: str
    weight: float | None = None
    epochs: float = 1.0
    keep: Filter = field(default_factory=Filter)
    key_rule: KeyRule = "auto"
