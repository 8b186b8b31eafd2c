"""A recipe: one YAML file that defines a run, assembled from the settings beside each stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from datapipe.schema import StageName
from datapipe.sources import SourceSettings
from datapipe.stages import ANNOTATE_STAGES, STAGES, StageBlocks
from datapipe.stages.classify import NsfwSettings, WatermarkSettings
from datapipe.stages.custom import CustomSettings
from datapipe.stages.describe import DescribeSettings
from datapipe.stages.stage import Stage, StageSettings
from subject_diffusion.errors import BackendError, SddError
from subject_diffusion.settings import ADDED_LATER, EXECUTION_ONLY, AlsoCalled, Settings, load_settings, validated

Result = TypeVar("Result")

Found = Mapping[StageName, Mapping[str, int]]
"""What a run found for settings that are auto: by stage, keys and values (true and false among them)."""


class Pool(Settings):
    """A pool of Ray actors that hold the models of some consecutive stages."""

    stages: tuple[StageName, ...]
    """The stages that each actor runs, in order."""
    workers: int | None = Field(None, ge=1)
    """Number of actors; default: as many as fit the cluster."""
    cpus: float = Field(1.0, gt=0)
    """CPU cores per actor."""
    gpus: float = Field(0.0, ge=0)
    """GPUs per actor; with a fraction, actors share one."""

    @property
    def name(self) -> str:
        """Its stages: "caption+tag"."""
        return "+".join(stage.value for stage in self.stages)

    @field_validator("gpus")
    @classmethod
    def _whole_gpus_or_part_of_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"{gpus:g} is neither a whole number nor a fraction of one GPU")
        return gpus


class RunSettings(Settings):
    """How the work is placed. Nothing here changes what is written."""

    fetch_workers: Annotated[int | None, AlsoCalled("processes_count")] = Field(None, ge=1)
    """Number of actors that download; default: one per CPU core."""
    fetch_cpus: float = Field(1.0, gt=0)
    """CPU cores per downloading actor."""
    pools: tuple[Pool, ...] = (Pool(stages=ANNOTATE_STAGES),)
    """The actors that annotate: one pool whose actors run every stage, or several that hand slices on. A custom stage
    runs with the stage that it follows, the nsfw and watermark stages with caption, describe with select."""
    deadline_s: float = Field(600.0, gt=0)
    """Seconds after which a micro-batch, or the reading of an image that came along, counts as hanging and its worker
    is ended."""
    stop_share: float = Field(0.95, gt=0, le=1)
    """The run stops when more than this share of a stage's last `stop_rows` rows failed for one reason, or got no
    caption, or too few tags or boxes, because the fault is then hardly theirs. The next run does those slices again; 1
    means never."""
    stop_rows: int = Field(5000, ge=1)
    """See `stop_share`."""
    without_gpu: bool = False
    """Whether to go on, on CPU cores, where pools ask for a GPU and there is none. SAM ViT-H alone takes 130 s per
    image on one core."""

    @model_validator(mode="after")
    def _every_stage_once_in_order(self) -> RunSettings:
        named = tuple(stage for pool in self.pools for stage in pool.stages)
        if named != ANNOTATE_STAGES:
            wanted = ", ".join(s.value for s in ANNOTATE_STAGES)
            raise ValueError(f"the pools must name each of {wanted} once, in this order")
        return self


class InputBlocks(Settings):
    """What a recipe says about its input."""

    toyworld: Any = None
    """A toy web to render, serve and read. `toyworld.recipe` knows its settings; the pipeline only records them."""
    source: SourceSettings = SourceSettings()
    """Where rows come from."""
    slice_rows: Annotated[int, AlsoCalled("number_sample_per_shard")] = Field(1000, ge=1, le=100_000)
    """Input rows per shard."""


class Recipe(StageBlocks, InputBlocks):
    """Everything about a run: the input, a block per stage, and how the work is placed."""

    nsfw: Annotated[NsfwSettings | None, ADDED_LATER] = None
    """A classifier of images that are not safe for work, before captioning."""
    watermark: Annotated[WatermarkSettings | None, ADDED_LATER] = None
    """A classifier of watermarks, before captioning."""
    describe: Annotated[DescribeSettings | None, ADDED_LATER] = None
    """A description of each entity, by a captioner that sees its cutout."""
    custom: Annotated[CustomSettings | None, ADDED_LATER] = None
    """A stage of the user's own."""
    run: Annotated[RunSettings, EXECUTION_ONLY] = RunSettings()

    @model_validator(mode="after")
    def _masks_from_somewhere(self) -> Self:
        if self.segment.backend == "grounded" and self.ground.backend != "sam3":
            raise ValueError("segment.backend=grounded takes the masks of ground.backend=sam3, the only one with masks")
        if self.ground.backend == "sam3" and self.select.max_rival_score is not None:
            raise ValueError(
                "select.max_rival_score: ground.backend=sam3 asks about each noun alone, which has no rival"
            )
        return self

    @model_validator(mode="after")
    def _objects_listed_and_taken(self) -> Self:
        if self.caption.objects != (self.tag.backend == "caption"):
            raise ValueError("caption.objects and tag.backend=caption go together: the one lists what the other takes")
        return self

    @model_validator(mode="after")
    def _server_answers_in_time(self) -> Self:
        for name, block in {"caption": self.caption, "describe": self.describe}.items():
            if block is not None and block.server and block.server_deadline_s >= self.run.deadline_s:
                raise ValueError(
                    f"{name}.server_deadline_s {block.server_deadline_s:g} must be less than run.deadline_s "
                    f"{self.run.deadline_s:g}, after which a worker is ended"
                )
        return self

    def stages(self) -> dict[StageName, StageSettings]:
        """The block of every stage, in order, with those of the optional ones in their places."""
        blocks = super().stages() | self._optional()
        return {name: blocks[name] for name in self.with_optional(STAGES)}

    def _optional(self) -> dict[StageName, StageSettings]:
        """The blocks of the stages that not every recipe has."""
        blocks = {
            StageName.NSFW: self.nsfw,
            StageName.WATERMARK: self.watermark,
            StageName.DESCRIBE: self.describe,
            StageName.CUSTOM: self.custom,
        }
        return {name: block for name, block in blocks.items() if block is not None}

    def with_optional(self, names: Sequence[StageName]) -> tuple[StageName, ...]:
        """The stages named, with the optional ones that this recipe has: classifiers before the captions, descriptions
        after selection, and the custom stage behind the one that it follows."""
        with_all: list[StageName] = []
        for name in names:
            if name is StageName.CAPTION:
                with_all += [screen for screen in (StageName.NSFW, StageName.WATERMARK) if screen in self._optional()]
            with_all.append(name)
            if name is StageName.SELECT and self.describe is not None:
                with_all.append(StageName.DESCRIBE)
            if self.custom is not None and name is self.custom.after:
                with_all.append(StageName.CUSTOM)
        return tuple(with_all)

    def pinned(self) -> Self:
        """The recipe with each model's revision resolved to a commit. Raises BackendError, with a line for each model
        that is missing."""
        blocks = self.stages()
        blocks.pop(StageName.CUSTOM, None)
        try:
            resolved = _with_each(blocks, lambda block: block.pinned())
        except SddError:
            _with_each(blocks, lambda block: block.pinned().check())  # those that need no commit may be missing, too
            raise
        return self.model_copy(update={name.value: block for name, block in resolved.items()})

    def with_found(self, found: Found) -> Self:
        """The recipe with what was found in place of each setting that is auto."""
        blocks = self.stages()
        return self.model_copy(
            update={
                name.value: blocks[name].model_copy(
                    update={key: value for key, value in settings.items() if getattr(blocks[name], key, None) == "auto"}
                )
                for name, settings in found.items()
            }
        )

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        del found["source.path"]  # The input has a fingerprint of its own.
        return found

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Raises RecipeError."""
    return load_settings(Recipe, path, overrides)


def recipe_of_run(identity: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Inverse of `Recipe.identity`; settings that are no part of it have their defaults. Raises RecipeError."""
    tree: dict[str, Any] = {}
    for key, value in identity.items():
        *path, last = key.split(".")
        block = tree
        for part in path:
            block = block.setdefault(part, {})
        block[last] = value
    return validated(Recipe, tree, overrides, "the recipe of the run")


def build_stage(name: StageName, recipe: Recipe) -> Stage:
    """A stage as a plain object, with its model loaded."""
    return recipe.stages()[name].build()


def check_stages(recipe: Recipe) -> None:
    """Makes sure, before any work, that every stage can be built. Raises BackendError, with a line for each that
    cannot."""
    _with_each(recipe.stages(), lambda block: block.check())


def _with_each(
    blocks: Mapping[StageName, StageSettings], step: Callable[[StageSettings], Result]
) -> dict[StageName, Result]:
    """The step's result for each block, all at once, because each may wait for a hub. Raises the error of the block
    that fails, or a BackendError with the lines of all that do."""
    with ThreadPoolExecutor(len(blocks)) as threads:
        steps = {name: threads.submit(step, block) for name, block in blocks.items()}
    errors = [error for each in steps.values() if (error := each.exception()) is not None]
    if len(errors) > 1 and all(isinstance(error, SddError) for error in errors):
        raise BackendError("\n".join(map(str, errors)))
    return {name: each.result() for name, each in steps.items()}
