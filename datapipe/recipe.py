"""A recipe: one YAML file that settles everything about a run, assembled from the settings beside each stage."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from datapipe.errors import RecipeError
from datapipe.isolation import Stage
from datapipe.schema import StageName
from datapipe.settings import Settings
from datapipe.sources import SourceSettings
from datapipe.stages import caption, ground, segment, tag
from datapipe.stages.caption import CaptionSettings, CaptionStage
from datapipe.stages.fetch import FetchSettings, FetchStage
from datapipe.stages.ground import GroundSettings, GroundStage
from datapipe.stages.screen import ScreenSettings, ScreenStage
from datapipe.stages.segment import SegmentSettings, SegmentStage
from datapipe.stages.select import SelectSettings, SelectStage
from datapipe.stages.tag import TagSettings, TagStage
from toyworld.web import ToyWebSettings

ANNOTATE_STAGES = (StageName.CAPTION, StageName.TAG, StageName.GROUND, StageName.SEGMENT, StageName.SELECT)

EXECUTION_KEYS = {"device", "micro_batch", "threads", "per_host", "batch_deadline_s"}
"""Settings of a stage that change how fast it runs and not what it writes; they may differ between a run and its
resume."""


class Pool(Settings):
    """A pool of Ray actors that hold the models of some consecutive stages."""

    stages: tuple[StageName, ...]
    """The stages that each actor runs, in order."""
    workers: int | None = Field(None, ge=1)
    """Number of actors; none: as many as fit the cluster."""
    cpus: float = Field(1.0, gt=0)
    """CPU cores that each actor claims."""
    gpus: float = Field(0.0, ge=0)
    """GPUs that each actor claims; a fraction lets actors share one."""


class RunSettings(Settings):
    """How the work is placed. Nothing here changes what is written."""

    fetch_workers: int | None = Field(None, ge=1)
    """Number of actors that download; none: one per CPU core."""
    fetch_cpus: float = Field(1.0, gt=0)
    """CPU cores that each of them claims."""
    pools: tuple[Pool, ...] = (Pool(stages=ANNOTATE_STAGES),)
    """Who annotates: one pool with every stage in each actor, or several, through which slices stream."""
    deadline_s: float = Field(600.0, gt=0)
    """Seconds after which a micro-batch is taken to hang and its worker is ended."""

    @model_validator(mode="after")
    def _every_stage_once_in_order(self) -> RunSettings:
        named = tuple(stage for pool in self.pools for stage in pool.stages)
        if named != ANNOTATE_STAGES:
            wanted = ", ".join(s.value for s in ANNOTATE_STAGES)
            raise ValueError(f"the pools must name each of {wanted} once, in this order")
        return self


class Recipe(Settings):
    """Everything about a run. What is left out has the default given beside each stage."""

    toyworld: ToyWebSettings | None = None
    """When given, and no input is named: render a toy web of images, serve it on loopback, and read that."""
    source: SourceSettings = SourceSettings()
    """Where rows come from."""
    slice_rows: int = Field(1000, ge=1, le=100_000)
    """Input rows that become one shard."""
    fetch: FetchSettings = FetchSettings()
    screen: ScreenSettings = ScreenSettings()
    caption: CaptionSettings = CaptionSettings()
    tag: TagSettings = TagSettings()
    ground: GroundSettings = GroundSettings()
    segment: SegmentSettings = SegmentSettings()
    select: SelectSettings = SelectSettings()
    run: RunSettings = RunSettings()

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is written, dotted key to value. The input has a fingerprint of its own."""
        tree = self.model_dump(mode="json", exclude={"run": True, "source": {"path"}})
        return {key: value for key, value in _leaves(tree) if key.rpartition(".")[2] not in EXECUTION_KEYS}

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key.sub=value` overrides (values in YAML). Raises RecipeError in one line."""
    try:
        tree = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file; the ones that come along are in manifests/recipes") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: expected keys and values at the top, found {type(tree).__name__}")
    return _validated(tree, overrides, f"recipe {path}")


def recipe_of_run(identity: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Inverse of `Recipe.identity`; settings that change nothing in what is written have their defaults. Raises
    RecipeError."""
    tree: dict[str, Any] = {}
    for key, value in identity.items():
        *path, last = key.split(".")
        block = tree
        for part in path:
            block = block.setdefault(part, {})
        block[last] = value
    return _validated(tree, overrides, "the recipe of the run")


def _validated(tree: dict[str, Any], overrides: Sequence[str], name: str) -> Recipe:
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{name}: {_explain(error)}") from None


def build_stage(name: StageName, recipe: Recipe) -> Stage:
    """The stage of a recipe as a plain object, its model loaded."""
    return _STAGES[name](getattr(recipe, name.value))


def check_stages(recipe: Recipe) -> None:
    """Makes sure, before any work, that every model is there or can be fetched. Raises BackendError."""
    caption.check(recipe.caption)
    tag.check(recipe.tag)
    ground.check(recipe.ground)
    segment.check(recipe.segment)


_STAGES: dict[StageName, Callable[[Any], Stage]] = {
    StageName.FETCH: FetchStage,
    StageName.SCREEN: ScreenStage,
    StageName.CAPTION: CaptionStage,
    StageName.TAG: TagStage,
    StageName.GROUND: GroundStage,
    StageName.SEGMENT: SegmentStage,
    StageName.SELECT: SelectStage,
}


def describe(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every setting, in the order of the data's way."""
    for name, field in model.model_fields.items():
        key = prefix + name
        block = _block_class(field.annotation)
        if block is not None:
            yield from describe(block, f"{key}.")
            continue
        if get_origin(field.annotation) is Literal:
            kind = " | ".join(get_args(field.annotation))
        else:
            kind = str(getattr(field.annotation, "__name__", field.annotation)).replace("typing.", "")
        default = "required" if field.is_required() else json.dumps(_plain(field.get_default()))
        yield key, kind, default, " ".join((field.description or "").split())


def _block_class(annotation: Any) -> type[Settings] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Settings) and c is not Pool), None)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value, for instance select.min_score=0.4")
    *path, last = key.strip().split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {override}: {part} is a value and has no keys of its own")
    tree[last] = yaml.safe_load(value)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [k for k, *_ in describe()]
        siblings = sorted({k.split(".")[0] for k in known} | set(known))
        near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "`sdd recipe` lists every key"
        return f"unknown key {key}; {hint}"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}"
    return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
