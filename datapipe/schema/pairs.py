"""What `sdd pairs` writes beside the shards: the same subject in two different images."""

from __future__ import annotations

from enum import Enum

import pyarrow as pa

PAIRS = "pairs.parquet"
PAIRS_SCHEMA = pa.schema(
    [
        ("key_a", pa.string()),
        ("entity_a", pa.int64()),
        ("tag_a", pa.string()),
        ("key_b", pa.string()),
        ("entity_b", pa.int64()),
        ("tag_b", pa.string()),
        ("similarity", pa.float32()),
        ("patch_similarity", pa.float32()),
        ("aligned", pa.float32()),
        ("rank_a", pa.int16()),
        ("rank_b", pa.int16()),
        ("copy_bits", pa.int16()),
        ("seconds", pa.float32()),
        ("rival", pa.float32()),
        ("margin", pa.float32()),
        ("rejected", pa.string()),
        ("identity", pa.string()),
    ]
)
"""One row for every candidate: two entities, a before b, and all that was measured. `rank_a`: which of a's neighbors b
is, from 1, null where it is none; `rank_b`: the other way round. `rejected`: null for a pair, else a `PairRejection`.
The rest: see docs/data-format.md."""

GIVEN_IDENTITIES = "identities-given.parquet"
"""The `identities.parquet` that a dataset came with, once `sdd pairs` has put its own in that place."""


class PairRejection(str, Enum):
    """Every reason for which a candidate is no pair; of several, the first."""

    SAME_PICTURE = "same_picture"
    """Two entities of one image."""
    EXCLUDED = "excluded"
    """An image is one of those to be kept out (`--exclude`)."""
    NEAR_COPY = "near_copy"
    """The images, or the cut-outs, are copies of each other."""
    NEAR_IN_TIME = "near_in_time"
    """Two frames of a clip, too soon one after the other."""
    UNLIKE = "unlike"
    """A similarity is below its threshold."""
    NOT_MUTUAL = "not_mutual"
    """One is not among the other's nearest neighbors."""
    OTHER_NOUN = "other_noun"
    """Alike, but of tags with another noun."""
    AMBIGUOUS = "ambiguous"
    """Another subject is as alike, or nearly: which of them it is cannot be told."""
    REPEATED = "repeated"
    """Its identity has a copy of one of the images already, or a frame that is near in time."""
    OVER_BOUND = "over_bound"
    """Its identity is in as many images as it may."""
