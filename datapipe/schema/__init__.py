"""The contract between the stages, the shards and the trainer: what a sample is, and how it is stored.

A new field takes two lines: in `sample.Sample`, and as a column of `table.SCHEMA`.
"""

from datapipe.schema.rle import MAX_PIXELS, RLE
from datapipe.schema.sample import (
    SCORES,
    Entity,
    Outcome,
    Reason,
    Rejection,
    Sample,
    Slice,
    StageName,
    Tag,
    Verdict,
)
from datapipe.schema.sample_json import from_json, to_json
from datapipe.schema.table import (
    IDENTITIES,
    IDENTITIES_SCHEMA,
    SCHEMA,
    SCHEMA_VERSION,
    TarMembers,
    current,
    from_table,
    slice_from_ipc,
    slice_to_ipc,
    to_parquet,
    to_table,
)
from datapipe.schema.text import clean_text, decisive, printable
from datapipe.schema.validation import entity_problems, sample_problems

__all__ = [
    "IDENTITIES",
    "IDENTITIES_SCHEMA",
    "MAX_PIXELS",
    "RLE",
    "SCHEMA",
    "SCHEMA_VERSION",
    "SCORES",
    "Entity",
    "Outcome",
    "Reason",
    "Rejection",
    "Sample",
    "Slice",
    "StageName",
    "Tag",
    "TarMembers",
    "Verdict",
    "clean_text",
    "current",
    "decisive",
    "entity_problems",
    "from_json",
    "from_table",
    "printable",
    "sample_problems",
    "slice_from_ipc",
    "slice_to_ipc",
    "to_json",
    "to_parquet",
    "to_table",
]
