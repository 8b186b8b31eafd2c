"""What there is to do: the slices of the input, which of them are missing, and whether this run may fill the folder."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datapipe.recipe import Found, Recipe, recipe_of_run
from datapipe.schema import SCHEMA_VERSION, Reason, Sample, StageName
from datapipe.shards import RUN_FILE, Kind, Provenance, Store, present
from datapipe.sources import InputRows
from subject_diffusion.errors import RunError, ShardError

AUTO_FILE = "auto.json"
"""What a run found on its GPUs for settings that are auto, by stage. A resumed run takes the same, because on a GPU the
sums of other batches, and of compiled models, round otherwise; without the file it tries anew."""

KINDS_OF_AUTO = {"micro_batch": int, "compile": bool}
"""The settings that a run finds, and what their values are."""

INPUT_KEYS = ("source.", "toyworld.")
"""Begin the recipe's keys that say how an input is read. Its fingerprint covers them; each part has its own."""


@dataclass(frozen=True)
class Part:
    """Rows that came into a dataset together; they have slices of their own.

    input: the fingerprint of the input that they are from. skip: how many of its rows an earlier part has. retried:
    where they are rows of the dataset that are done again, how many of each "stage/reason".
    """

    rows: int
    input: str
    skip: int = 0
    retried: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything that defines a run, small enough to be sent to every worker. `sources`: the inputs at hand, by their
    fingerprints; of a part that is done none is needed."""

    recipe: Recipe
    parts: tuple[Part, ...]
    sources: Mapping[str, InputRows]
    out: str
    provenance: Provenance

    @property
    def slices(self) -> int:
        return slices_of(self.parts, self.recipe.slice_rows)

    def rows_of(self, slice_index: int) -> range:
        """The rows of a slice."""
        return self._located(slice_index)[1]

    def read(self, slice_index: int, hold: Callable[[bytes], bytes] = bytes) -> list[Sample]:
        """The samples of a slice, with the images that came along, each as `hold` gives it back."""
        part, rows, first = self._located(slice_index)
        start = part.skip + rows.start - first
        return self.sources[part.input].read(start, start + len(rows), rows.start, hold)

    def provenance_of(self, slice_index: int) -> Provenance:
        """What a slice's shard is made with."""
        return replace(self.provenance, input=self._located(slice_index)[0].input)

    def missing(self, store: Store, kind: Kind) -> list[int]:
        """The slices that have no manifest yet."""
        done = set(present(store, kind))
        return [index for index in range(self.slices) if index not in done]

    def to_fetch(self, store: Store) -> list[int]:
        """The slices of which there is no shard of either kind: raw ones may be deleted once the final ones exist."""
        raw = set(present(store, "raw"))
        return [index for index in self.missing(store, "shard") if index not in raw]

    def with_found(self, found: Found) -> Plan:
        """See `Recipe.with_found`."""
        return replace(self, recipe=self.recipe.with_found(found))

    def _located(self, slice_index: int) -> tuple[Part, range, int]:
        """The part of a slice, the slice's rows, and the part's first row."""
        before, size = 0, self.recipe.slice_rows
        for part, first in zip(self.parts, first_rows(self.parts), strict=True):
            if slice_index < before + slices_of([part], size):
                start = first + (slice_index - before) * size
                return part, range(start, min(start + size, first + part.rows)), first
            before += slices_of([part], size)
        raise IndexError(f"slice {slice_index} of {self.slices}")


def slices_of(parts: Sequence[Part], slice_rows: int) -> int:
    """How many slices these parts have."""
    return sum(math.ceil(part.rows / slice_rows) for part in parts)


def first_rows(parts: Sequence[Part]) -> list[int]:
    """The first row of each part."""
    return [0, *itertools.accumulate(part.rows for part in parts)][: len(parts)]


def retried(parts: Sequence[Part]) -> Counter[tuple[StageName, Reason]]:
    """The failed rows that were done again, by what failed them: their parts hold them a second time."""
    again: Counter[tuple[StageName, Reason]] = Counter()
    for part in parts:
        for why, rows in part.retried.items():
            stage, _, reason = why.partition("/")
            again[StageName(stage), Reason(reason)] += rows
    return again


def make_plan(recipe: Recipe, parts: Sequence[Part], sources: Mapping[str, InputRows], store: Store) -> Plan:
    """The plan of a run into a dataset folder."""
    used = {name.value: block.model_used() for name, block in recipe.stages().items()}
    models = {name: model for name, model in used.items() if model is not None}
    provenance = Provenance(recipe.hash(), code_hash(), parts[-1].input, models)
    return Plan(recipe, tuple(parts), sources, store.url, provenance)


def check_folder(plan: Plan, store: Store) -> None:
    """Refuses a folder that holds anything other than what this plan makes, or a part of it. Raises RunError."""
    if not store.exists(RUN_FILE):
        if present(store, "raw") or present(store, "shard"):
            raise RunError(f"{plan.out} holds shards but no {RUN_FILE}; choose another OUT")
        return
    held, claim = _held(store), _claim(plan)
    for what, before, now in (
        ("another recipe", _without_input(held["recipe"]), _without_input(claim["recipe"])),
        ("other models", held["models"], claim["models"]),
    ):
        if before != now:
            raise RunError(f"{plan.out} holds shards of {what} ({_first_difference(before, now)}); choose another OUT")
    if held["parts"] != claim["parts"][: len(held["parts"])]:
        raise RunError(
            f"{plan.out} holds shards of another input, or it changed since; --append adds this one's rows to them, "
            "or choose another OUT"
        )


def check_sources(plan: Plan, missing: Sequence[int]) -> None:
    """Refuses to make slices of an input that is not at hand. Raises RunError."""
    lacking = [index for index in missing if plan.provenance_of(index).input not in plan.sources]
    if lacking:
        raise RunError(
            f"{plan.out}: {len(lacking)} shards of an earlier input are missing, number {lacking[0]} first; "
            "run the same command with that input before you add to it"
        )


def claim_folder(plan: Plan, store: Store) -> None:
    """Records in the folder what it is for."""
    claim = _claim(plan)
    if store.exists(RUN_FILE):
        held = _held(store)
        if held["parts"] == claim["parts"]:
            return
        claim = held | {"parts": claim["parts"]}
    store.put(RUN_FILE, (json.dumps(claim, indent=1, sort_keys=True) + "\n").encode())


def read_found(store: Store) -> Found:
    """What was recorded in the folder; empty when nothing was. Raises RunError."""
    if not store.exists(AUTO_FILE):
        return {}
    try:
        recorded = {StageName(name): dict(found) for name, found in json.loads(store.read(AUTO_FILE)).items()}
        if all(KINDS_OF_AUTO[key] is type(value) for found in recorded.values() for key, value in found.items()):
            return recorded
    except (ValueError, TypeError, AttributeError, KeyError):
        pass
    raise RunError(f"{store.root}/{AUTO_FILE}: not what a run records; remove it, and it is found anew")


def found_words(found: Found) -> list[str]:
    """For a person: "segment micro_batch 16, compile true"."""
    return [
        f"{stage.value} {', '.join(f'{key} {json.dumps(value)}' for key, value in settings.items())}"
        for stage, settings in found.items()
    ]


def record_found(store: Store, found: Found) -> None:
    """Adds it to what is recorded."""
    if found:
        known = {name.value: settings for name, settings in {**read_found(store), **found}.items()}
        store.put(AUTO_FILE, (json.dumps(known, indent=1) + "\n").encode())


@dataclass(frozen=True)
class RunRecord:
    """What a folder was made for, according to `run.json`. `identity`: the recipe's, as of the first part."""

    parts: tuple[Part, ...]
    models: dict[str, str]
    identity: dict[str, Any]
    recipe: Recipe


def read_run(store: Store) -> RunRecord:
    """Raises ShardError when the folder has no record that this release can read."""
    held = _held(store)
    return RunRecord(_parts(held), held["models"], held["recipe"], recipe_of_run(held["recipe"]))


def parts_of(store: Store) -> tuple[Part, ...]:
    """What has come into a folder so far; into one that has no record, nothing. Raises ShardError."""
    return _parts(_held(store)) if store.exists(RUN_FILE) else ()


def _parts(held: Mapping[str, Any]) -> tuple[Part, ...]:
    return tuple(Part(**part) for part in held["parts"])


def _held(store: Store) -> dict[str, Any]:
    """The folder's record, once it is sure to be one of this release's. Raises ShardError."""
    if not store.exists(RUN_FILE):
        raise ShardError(f"{store.root}: no {RUN_FILE} here; name the folder that `sdd dataset` wrote")
    try:
        held: dict[str, Any] = json.loads(store.read(RUN_FILE))
        version = held["schema_version"]
        if version == SCHEMA_VERSION:
            _parts(held), held["models"].items(), held["recipe"].items()
            return held
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ShardError(f"{store.root}/{RUN_FILE}: not the record of a run; name another folder") from None
    raise ShardError(
        f"{store.root}: of schema version {version}; this release reads and writes {SCHEMA_VERSION}; "
        "use the release that made it, or another folder"
    )


def refuse_other_formats(store: Store) -> None:
    """Raises ShardError for the folder of another release's run, so that it is told before an input is read."""
    if store.exists(RUN_FILE):
        _held(store)


def _claim(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "parts": [asdict(part) for part in plan.parts],
        "recipe": plan.recipe.identity(),
        "models": plan.provenance.models,
    }


def _without_input(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if not key.startswith(INPUT_KEYS)}


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    key = next(k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k))
    return f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"


@functools.cache
def code_hash() -> str:
    """SHA-256 of this package's sources, in path order."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
