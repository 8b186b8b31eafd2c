"""A sample as the `{key}.json` beside its image in the tar: what the trainer reads."""

from __future__ import annotations

import json
from typing import Any

from datapipe.schema.sample import Outcome, Sample, StageName
from datapipe.schema.table import PLAIN_FIELDS, SCHEMA_VERSION, entity_to_row, from_row, to_row
from datapipe.schema.validation import sample_problems
from subject_diffusion.errors import ShardError


def to_json(sample: Sample) -> bytes:
    """Accepted entities only; keys sorted, and left out where there is no value; ends with a newline.

    A reader that takes the types of all samples from the first few, as `datasets` does, can neither turn a null into
    a number later on nor write an object without keys to parquet.
    """
    row = to_row(sample)
    tree = {
        "schema_version": SCHEMA_VERSION,
        **{name: row[name] for name in PLAIN_FIELDS},
        "key": row["key"],
        "scores": row["scores"] or None,
        "phash": None if sample.phash is None else f"{sample.phash:016x}",
        "tags": row["tags"],
        "entities": [entity_to_row(e) for e in sample.entities],
    }
    for entity in tree["entities"]:
        del entity["rejected"]
    return (json.dumps(_without_nulls(tree), sort_keys=True, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def from_json(data: bytes) -> Sample:
    """A kept sample as its shard tells it: with accepted entities only, and without its image. Raises ShardError for
    anything else, and for one that `sample_problems` objects to."""
    try:
        tree = json.loads(data)
        version = tree["schema_version"]
        if version != SCHEMA_VERSION:
            raise ShardError(f"sample of schema version {version}; this release reads {SCHEMA_VERSION}")
        phash = int(tree["phash"], 16) if "phash" in tree else None
        absent: dict[str, Any] = {"http_status": None, "clip": None, "time_s": None, "scores": {}}
        row = {**absent, **tree, "phash": phash, "candidates": tree["entities"]}
        sample = from_row(row | {"outcome": Outcome.KEPT.value, "stage": StageName.SELECT.value, "thumbnail": None})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise ShardError(f"not a sample of this project: {data[:60]!r}") from None
    problem = next(sample_problems(sample), None)
    if problem is not None:
        raise ShardError(problem)
    return sample


def _without_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _without_nulls(value) for name, value in tree.items() if value is not None}
    return [_without_nulls(value) for value in tree] if isinstance(tree, list) else tree
