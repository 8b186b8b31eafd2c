"""The commands that train the subject model and score it: arguments in, one call, what it said out."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.console import Console

from subject_diffusion._extras import require
from subject_diffusion.errors import RecipeError, RunError

if TYPE_CHECKING:
    from train.trainer.recipe import TrainRecipe

RECIPE = Path("train-toy")
DEFAULT_MODEL = "[default: out/train-toy, if `make train` has made it, else the bundled toy model]"
HELD_OUT = "out/toy-held-out"
MAKES_HELD_OUT = (
    f"sdd dataset --out {HELD_OUT} --set toyworld.seed=1 --set toyworld.images=400 --set toyworld.identities=10"
)
LABELS = Path("toy")

_HeldOut = Annotated[str, typer.Option(help="Dataset of images that the runs have not seen.")]
_Images = Annotated[int, typer.Option("--images", help="How many of them.", min=2)]
_Labels = Annotated[
    Path, typer.Option(help="Recipe (a file or a name) whose detector and segmenter find the subjects in the samples.")
]
_Cluster = Annotated[str | None, typer.Option(help="Ray cluster. [default: Ray on this machine]", envvar="RAY_ADDRESS")]
_ClusterOfWorkers = Annotated[
    str | None,
    typer.Option(help="Ray cluster, for run.workers > 1. [default: Ray on this machine]", envvar="RAY_ADDRESS"),
]


def train(
    recipe: Annotated[
        Path,
        typer.Option("--recipe", help="The run: a YAML file, or a bundled recipe: train-toy or subject-diffusion."),
    ] = RECIPE,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Dataset folder or tars, in place of `sources`; the filter stays."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="Folder or bucket for checkpoints, pictures, pipeline. [default: out/RECIPE]"),
    ] = None,
    ray_address: _ClusterOfWorkers = None,
    exported: Annotated[
        int | None,
        typer.Option("--export", metavar="STEP", help="Only write the pipeline of the checkpoint of a step.", min=1),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: optimizer.lr=1e-4")] = None,
) -> None:
    """Trains the subject model. Stopped and run again, it continues where it was, with the same losses."""
    require("train")

    from train.trainer.run_folder import check_start

    if exported is not None:
        _export(Path(out or f"out/{recipe.stem}"), exported)
        return
    settings = _training_recipe(recipe, data, overrides)
    out = out or f"out/{recipe.stem}"
    check_start(settings)

    from train.trainer.launch import is_first
    from train.trainer.launch import train as launch

    quieten()
    console = Console(quiet=not is_first())
    if not launch(settings, out, ray_address):
        console.print(f"stopped and saved in {out}; the same command goes on from here", highlight=False)
        return
    console.print(f"pipeline: {out}/pipeline\npictures: {out}/validation-*.png", highlight=False, soft_wrap=True)


def cache(
    recipe: Annotated[Path, typer.Option("--recipe", help="The training run: a YAML file, or a name.")] = RECIPE,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Dataset folder, in place of `sources`; the filter stays."),
    ] = None,
    ray_address: _ClusterOfWorkers = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: examples.crops=4")] = None,
) -> None:
    """Encodes a training's images and references beforehand.

    Those are examples.crops of each image and examples.reference.draws of each subject. Stopped and run again, it does
    the shards that are missing; `run.cached_latents` and `run.cached_references` then have `sdd train` read them.
    """
    require("train")

    from train.trainer.run_folder import check_start

    settings = _training_recipe(recipe, data, overrides)
    if settings.examples.crops is None and settings.examples.reference.draws is None:
        raise RunError(
            "say in how many ways each image is cut, --set examples.crops=4 say, or how many references each subject "
            "has, --set examples.reference.draws=4"
        )
    check_start(settings)

    from train.trainer.encoder_cache_run import fill_caches

    quieten()
    for kind, shards in fill_caches(settings, ray_address).items():
        Console().print(f"{kind} of {shards} shard(s) computed; train with run.cached_{kind}=true", highlight=False)


def _training_recipe(recipe: Path, data: list[str] | None, overrides: list[str] | None) -> TrainRecipe:
    from subject_diffusion.settings import load_settings
    from train.stream.filter import Filter
    from train.stream.source import Source
    from train.trainer.recipe import TrainRecipe

    settings = load_settings(TrainRecipe, recipe, overrides or [])
    if not data:
        return settings
    keep = settings.sources[0].keep if settings.sources else Filter()
    return settings.model_copy(update={"sources": tuple(Source(path, keep=keep) for path in data)})


def _export(run: Path, step: int) -> None:
    from train.trainer.run_folder import PIPELINE, checkpoint_of

    checkpoint, folder = checkpoint_of(run, step), run / f"{PIPELINE}-{step:08d}"

    from train.trainer.pipeline import export

    quieten()
    export(checkpoint, folder)
    Console().print(f"pipeline: {folder}", highlight=False, soft_wrap=True)


def ablate(
    recipe: Annotated[Path, typer.Option("--recipe", help="The full model: a YAML file, or a name.")] = RECIPE,
    data: _HeldOut = HELD_OUT,
    images: _Images = 96,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.", min=1)] = 2,
    labels: _Labels = LABELS,
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and their reports.")] = Path("out/ablation"),
    ray_address: _Cluster = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting of the recipe.")] = None,
) -> None:
    """Repeats the paper's ablation.

    It trains the model without each of its parts in turn, scores each, and compares. As many train at once as fit.
    """
    require("train")

    from datapipe.recipe import load_recipe
    from subject_diffusion.settings import load_settings
    from train.trainer.recipe import TrainRecipe

    finder = load_recipe(labels)
    settings = load_settings(TrainRecipe, recipe, overrides or [])
    _check_trials([settings], data, out)

    from train.evaluation.ablate import SUBJECTS, VARIANTS, Comparison, compare, table
    from train.evaluation.ablate import ablate as run
    from train.evaluation.report import Evaluation

    quieten()
    console = Console()
    asked = Evaluation(data=data, images=images, labels=finder)
    scores = run(settings, out, asked, range(seeds), ray_address)
    if len(scores) < seeds * len(VARIANTS) * len(SUBJECTS):
        console.print(f"stopped and saved in {out}; the same command goes on from here", highlight=False)
        return
    cells = compare(scores)
    Comparison(settings, asked, range(seeds), cells).write(out)
    console.print(table(cells))
    console.print(f"report: {out}/report.json", highlight=False, soft_wrap=True)


def sweep(
    over: Annotated[
        list[str],
        typer.Option(
            "--over", metavar="KEY=[…]", help="A setting and its values: optimizer.lr=[1e-4,3e-4]; repeatable."
        ),
    ],
    recipe: Annotated[Path, typer.Option("--recipe", help="The run: a YAML file, or a name.")] = RECIPE,
    data: _HeldOut = HELD_OUT,
    images: _Images = 96,
    labels: _Labels = LABELS,
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and their reports.")] = Path("out/sweep"),
    ray_address: _Cluster = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting in all runs.")] = None,
) -> None:
    """Trains with every combination of some settings' values, scores each, and shows them side by side.

    As many train at once as fit. Stopped and run again, it continues where it was.
    """
    require("train")

    from datapipe.recipe import load_recipe
    from subject_diffusion.settings import load_settings
    from train.trainer.recipe import TrainRecipe

    finder = load_recipe(labels)
    recipes = {c: load_settings(TrainRecipe, recipe, [*(overrides or []), *c]) for c in _combinations(over)}
    _check_trials(list(recipes.values()), data, out)

    from train.evaluation.report import Evaluation
    from train.evaluation.sweep import sweep as run
    from train.evaluation.sweep import table, write_sweep
    from train.evaluation.trials import STOPPED

    quieten()
    console = Console()
    asked = Evaluation(data=data, images=images, labels=finder)
    found = run(recipes, out, asked, ray_address)
    if all(combination.why not in ("", STOPPED) for combination in found):
        raise RunError(f"no run came to its end; the first: {found[0].why}")
    write_sweep(found, asked, out)
    console.print(table(found))
    console.print(f"report: {out}/report.json", highlight=False, soft_wrap=True)
    if any(combination.why == STOPPED for combination in found):
        console.print(f"stopped and saved in {out}; the same command goes on from here", highlight=False)


def _combinations(over: Sequence[str]) -> list[tuple[str, ...]]:
    """over: settings with a list of values each, such as "optimizer.lr=[1e-4, 3e-4]". Returns every combination, as
    overrides of a recipe. Raises RecipeError."""
    choices = []
    for text in over:
        key, equals, values = text.partition("=")
        try:
            listed = yaml.safe_load(values)
        except yaml.YAMLError:
            listed = None
        if not (equals and isinstance(listed, list) and listed):
            raise RecipeError(f"--over {text}: wanted a setting and a list of values: optimizer.lr=[1e-4,3e-4]")
        choices.append(
            [
                f"{key}={yaml.safe_dump(value, default_flow_style=True, width=math.inf).splitlines()[0]}"
                for value in listed
            ]
        )
    return list(itertools.product(*choices))


def _check_trials(recipes: Sequence[TrainRecipe], data: str, out: Path) -> None:
    """Raises SddError, before anything heavy is imported."""
    from train.stream.shard_index import check_there
    from train.trainer.run_folder import check_start

    check_there(data)
    if not all(recipe.sources for recipe in recipes):
        raise RunError("the recipe names no data to learn from: --set 'sources=[{path: DIR}]'")
    for recipe in recipes:
        check_start(recipe)
    if re.match(r"\w+:/", str(out)):
        raise RunError(f"--out {out}: several runs are written to a local folder, which all nodes share; name one")


def quieten() -> None:
    """Loading a dozen small files needs no progress bars, nor warnings about parts of a folder that are not ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
