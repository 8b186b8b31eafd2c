"""A recipe: one YAML file that settles everything about a run, assembled from the settings beside each stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from datapipe.isolation import Stage
from datapipe.schema import StageName
from datapipe.settings import Settings, leaves, load_settings, validated
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
        return {key: value for key, value in leaves(tree) if key.rpartition(".")[2] not in EXECUTION_KEYS}

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Raises RecipeError."""
    return load_settings(Recipe, path, overrides)


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
    return validated(Recipe, tree, overrides, "the recipe of the run")


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
