"""What there is to do: the slices of the input, which of them are missing, and whether the folder is ours to fill."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datapipe.errors import RunError
from datapipe.recipe import Recipe
from datapipe.schema import SCHEMA_VERSION
from datapipe.shards import Kind, Provenance, Store, present
from datapipe.sources import Source

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Plan:
    """A run, settled: small enough to be sent to every worker."""

    recipe: Recipe
    source: Source
    out: str
    provenance: Provenance

    @property
    def slices(self) -> int:
        return math.ceil(self.source.rows / self.recipe.slice_rows)

    def rows_of(self, slice_index: int) -> range:
        """Row numbers of a slice."""
        start = slice_index * self.recipe.slice_rows
        return range(start, min(start + self.recipe.slice_rows, self.source.rows))

    def missing(self, store: Store, kind: Kind) -> list[int]:
        """The slices that have no manifest yet."""
        done = set(present(store, kind))
        return [index for index in range(self.slices) if index not in done]


def make_plan(recipe: Recipe, source: Source, out: str) -> Plan:
    models = {
        "caption": recipe.caption.identity if recipe.caption.backend == "transformers" else recipe.caption.backend,
        "tag": recipe.tag.model if recipe.tag.backend == "spacy" else recipe.tag.backend,
        "ground": recipe.ground.identity,
        "segment": recipe.segment.identity,
    }
    provenance = Provenance(recipe.hash(), code_hash(), source.fingerprint, models)
    return Plan(recipe, source, out, provenance)


def claim_folder(plan: Plan, store: Store) -> None:
    """Writes down what the folder is for, or refuses it when it holds something else. Raises RunError."""
    claim = {
        "schema_version": SCHEMA_VERSION,
        "rows": plan.source.rows,
        "input": plan.source.fingerprint,
        "recipe": plan.recipe.identity(),
    }
    if not store.exists(RUN_FILE):
        if present(store, "raw") or present(store, "shard"):
            raise RunError(f"{plan.out} holds shards but no {RUN_FILE}; choose another OUT")
        store.put(RUN_FILE, (json.dumps(claim, indent=1, sort_keys=True) + "\n").encode())
        return
    held: dict[str, Any] = json.loads(store.read(RUN_FILE))
    if held == claim:
        return
    if held["recipe"] != claim["recipe"]:
        raise RunError(
            f"{plan.out} holds another recipe's shards ({_first_difference(held, claim)}); choose another OUT"
        )
    raise RunError(
        f"{plan.out} holds shards of another input ({held['rows']} rows, or changed since); choose another OUT"
    )


def _first_difference(held: dict[str, Any], claim: dict[str, Any]) -> str:
    before, now = held["recipe"], claim["recipe"]
    key = next(k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k))
    return f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"


@functools.cache
def code_hash() -> str:
    """SHA-256 over this package's sources, in path order."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
