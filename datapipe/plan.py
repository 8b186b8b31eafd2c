"""What there is to do: the slices of the input, which of them are missing, and whether the folder is ours to fill."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datapipe.backends.loading import identity
from datapipe.errors import RunError, ShardError
from datapipe.recipe import Recipe, recipe_of_run
from datapipe.schema import SCHEMA_VERSION
from datapipe.shards import RUN_FILE, Kind, Provenance, Store, present
from datapipe.sources import Source


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


def make_plan(recipe: Recipe, source: Source, store: Store) -> Plan:
    """The plan of a run into a dataset folder."""
    models = {
        "caption": identity(recipe.caption) if recipe.caption.backend == "transformers" else recipe.caption.backend,
        "tag": recipe.tag.model if recipe.tag.backend == "spacy" else recipe.tag.backend,
        "ground": identity(recipe.ground),
        "segment": identity(recipe.segment),
    }
    provenance = Provenance(recipe.hash(), code_hash(), source.fingerprint, models)
    return Plan(recipe, source, store.url, provenance)


def check_folder(plan: Plan, store: Store) -> None:
    """Refuses a folder that holds something else than this plan makes. Raises RunError."""
    if not store.exists(RUN_FILE):
        if present(store, "raw") or present(store, "shard"):
            raise RunError(f"{plan.out} holds shards but no {RUN_FILE}; choose another OUT")
        return
    held: dict[str, Any] = json.loads(store.read(RUN_FILE))
    claim = _claim(plan)
    if held == claim:
        return
    for what, key in (("another recipe", "recipe"), ("other models", "models")):
        if held[key] != claim[key]:
            difference = _first_difference(held[key], claim[key])
            raise RunError(f"{plan.out} holds shards of {what} ({difference}); choose another OUT")
    raise RunError(f"{plan.out} holds shards of another input, or it changed since; choose another OUT")


def claim_folder(plan: Plan, store: Store) -> None:
    """Writes down what the folder is for."""
    if not store.exists(RUN_FILE):
        store.put(RUN_FILE, (json.dumps(_claim(plan), indent=1, sort_keys=True) + "\n").encode())


@dataclass(frozen=True)
class RunRecord:
    """What a folder was made for, as `run.json` tells it. `identity`: of the recipe; `input`: the fingerprint."""

    rows: int
    input: str
    models: dict[str, str]
    identity: dict[str, Any]
    recipe: Recipe


def read_run(store: Store) -> RunRecord:
    """Raises ShardError when the folder has none of this release's."""
    if not store.exists(RUN_FILE):
        raise ShardError(f"{store.root}: no {RUN_FILE} here; name the folder that `sdd dataset` wrote")
    try:
        held = json.loads(store.read(RUN_FILE))
        version = held["schema_version"]
        if version != SCHEMA_VERSION:
            raise ShardError(f"{store.root}: of schema version {version}; this release reads {SCHEMA_VERSION}")
        return RunRecord(held["rows"], held["input"], held["models"], held["recipe"], recipe_of_run(held["recipe"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ShardError(f"{store.root}/{RUN_FILE}: not the record of a run") from None


def _claim(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "rows": plan.source.rows,
        "input": plan.source.fingerprint,
        "recipe": plan.recipe.identity(),
        "models": plan.provenance.models,
    }


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
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
