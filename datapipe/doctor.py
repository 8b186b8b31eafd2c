"""What could stop a run, found before any work: one line per check."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from platform import python_version
from typing import TYPE_CHECKING

from datapipe.backends.hub import HubModel
from datapipe.backends.loading import ModelSettings, model_on_hub
from datapipe.machine import GB, Check, check_machine, check_out
from datapipe.recipe import Pool, Recipe, RunSettings
from datapipe.schema import StageName
from datapipe.sources import InputRows, open_source
from datapipe.sources.preview import ROWS
from datapipe.stages.stage import StageSettings
from subject_diffusion._extras import help_for
from subject_diffusion.errors import BackendError, SddError, one_line

if TYPE_CHECKING:
    from datapipe.probe import Answer

PACKAGES = ("torch", "ray", "transformers")


def diagnose(recipe: Recipe, source: str | None, out: str, address: str | None) -> Iterator[Check]:
    """What a run of this recipe needs: packages, this machine, the input, the hub, Ray, GPUs, and models that answer.

    source: the input; default: the recipe's, if it names one. address: of a Ray cluster; default: Ray starts here.
    """
    packages = list(_packages())
    yield from packages
    yield from check_machine()
    yield from check_out(out)
    rows: InputRows | None = None
    if path := source or recipe.source.path:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                rows = open_source(recipe.source.model_copy(update={"path": path}), scratch, ROWS)
            yield Check("warn" if rows.found and rows.found.lost else "ok", rows.described()[0])
        except SddError as error:
            yield from _failures(error)
    if any(check.level == "FAIL" for check in packages):
        return  # The rest cannot be asked without them.
    yield from _hub(recipe)
    there: dict[StageName, StageSettings] = {}
    for name, block in recipe.stages().items():
        try:
            pinned = block.pinned()
            pinned.check()
            there[name] = pinned
        except SddError as error:
            yield from _failures(error)
    is_whole = recipe.source.kind != "hf"  # of which only the first rows were opened
    slices = math.ceil(rows.rows / recipe.slice_rows) if rows and is_whole else sys.maxsize
    yield from _on_ray(recipe, there, slices, address)


def _packages() -> Iterator[Check]:
    yield Check("ok", f"python {python_version()}")
    for name in PACKAGES:
        try:
            found = f"{name} {version(name)}"
            if name == "torch":
                from torch.version import cuda

                found += f" for CUDA {cuda}" if cuda else " without CUDA"
            yield Check("ok", found)
        except ImportError as error:  # as importlib.metadata's own is, too
            yield Check("FAIL", help_for(error, "label") or f"{name} cannot be imported: {one_line(error)}")


def _hub(recipe: Recipe) -> Iterator[Check]:
    """Whether the hub answers, where a model comes from it."""
    hub = next(filter(None, map(_hub_of, recipe.stages().values())), None)
    if hub is not None:
        from huggingface_hub.constants import ENDPOINT

        if hub.answers():
            yield Check("ok", f"the hub at {ENDPOINT} answers")
        else:
            yield Check("warn", f"the hub at {ENDPOINT} cannot be reached, so that only models in its cache are there")


def _hub_of(block: StageSettings) -> HubModel | None:
    """The block's model on the hub; None also where its backend uses no such model."""
    hub = model_on_hub(block) if isinstance(block, ModelSettings) and block.computes_here else None
    with suppress(BackendError):  # a checkpoint that is missing is the next check's to tell
        return hub if hub is not None and hub.id in (block.model_used() or "") else None
    return None


def _on_ray(
    recipe: Recipe, there: Mapping[StageName, StageSettings], slices: int, address: str | None
) -> Iterator[Check]:
    """Whether Ray and room for the pools are there, and each model that is `there` answers in its place."""
    from ray.exceptions import RayError

    from datapipe import cluster
    from datapipe.run import in_one_line

    recipe = recipe.model_copy(update={name.value: _untried(block) for name, block in there.items()})
    try:
        with cluster.connected(address):
            yield Check("ok", f"Ray {f'at {address}' if address else 'starts'}: {cluster.resources()}")
            settings = cluster.find_room(recipe.run, slices, address)
            yield from _gpus(recipe, settings)
            for pool in settings.pools:
                yield from _answers(recipe, pool.model_copy(update={"stages": [s for s in pool.stages if s in there]}))
    except RayError as error:
        yield from _failures(in_one_line(error))
    except SddError as error:
        yield from _failures(error)


def _untried(block: StageSettings) -> StageSettings:
    """The block with nothing left to find, because a run does that, and not this."""
    if not isinstance(block, ModelSettings):
        return block
    fixed = {"micro_batch": 1, "compile": False}
    return block.model_copy(update={key: value for key, value in fixed.items() if hasattr(block, key)})


def _gpus(recipe: Recipe, settings: RunSettings) -> Iterator[Check]:
    """What each pool's GPU is, and whether it computes in the dtypes that the recipe asks for."""
    import ray

    if any(pool.gpus for pool in recipe.run.pools) and not any(pool.gpus for pool in settings.pools):
        yield Check("warn", "no GPU: the models run on CPU cores, in float32 and slowly")
    for pool in settings.pools:
        if pool.gpus:
            yield ray.get(ray.remote(num_cpus=0, num_gpus=pool.gpus)(_gpu).remote(recipe, pool))


def _gpu(recipe: Recipe, pool: Pool) -> Check:
    """In a process of Ray's, which shows it the pool's GPU."""
    import torch

    if not torch.cuda.is_available():
        return Check("FAIL", f"{pool.name}: Ray has a GPU, and torch sees none; update the driver, or torch")
    properties = torch.cuda.get_device_properties(0)
    there = f"{pool.name}: {properties.name}, {properties.total_memory / GB:.0f} GB"
    blocks = recipe.stages()
    halves = [name.value for name in pool.stages if getattr(blocks[name], "dtype", "float32") == "bfloat16"]
    if halves and not torch.cuda.is_bf16_supported(including_emulation=False):
        settings = " ".join(f"--set {name}.dtype=float16" for name in halves)
        return Check("warn", f"{there}, which has no bfloat16 of its own and is slow with it; {settings}")
    return Check("ok", f"{there}{', bfloat16' if halves else ''}")


def _answers(recipe: Recipe, pool: Pool) -> Iterator[Check]:
    """Whether each of the pool's stages is built, and its model answers on an image, where it will run."""
    import ray
    from ray.exceptions import RayError

    from datapipe.run import asking, in_one_line

    for stage in pool.stages:
        try:
            answers: dict[StageName, Answer] = ray.get(
                asking(recipe, pool.model_copy(update={"stages": (stage,)}), rows=0)
            )
            yield Check("ok", f"{stage.value} answers on an image in {answers[stage].took_s:.1f} s")
        except RayError as error:
            yield from _failures(in_one_line(error))


def _failures(error: SddError) -> Iterator[Check]:
    """A line for each fault that an error names."""
    for line in str(error).splitlines():
        yield Check("FAIL", line)
