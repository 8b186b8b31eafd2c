"""The commands that train the subject model and score it: arguments in, one call, what it said out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from subject_diffusion._extras import require
from subject_diffusion.errors import RunError

RECIPE = Path("train-toy")
RUN = Path("out/train-toy")
HELD_OUT = "out/toy-held-out"
LABELS = Path("toy")


def train(
    recipe: Annotated[
        Path,
        typer.Option("--recipe", help="The run: a YAML file, or train-toy or subject-diffusion, which come along."),
    ] = RECIPE,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Dataset folder or tars, in place of `sources`; the filter stays."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="Folder or bucket for checkpoints, pictures, pipeline. [default: out/RECIPE]"),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster, for run.workers > 1. [default: Ray on this machine]", envvar="RAY_ADDRESS"),
    ] = None,
    exported: Annotated[
        int | None,
        typer.Option("--export", metavar="STEP", help="Only write the pipeline of the checkpoint of a step.", min=1),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: optimizer.lr=1e-4")] = None,
) -> None:
    """Trains the subject model. Stopped and run again, it continues where it was, with the same losses."""
    require("train")

    from subject_diffusion.settings import load_settings
    from train.stream.filter import Filter
    from train.stream.source import Source
    from train.trainer.recipe import TrainRecipe
    from train.trainer.run_folder import check_start

    if exported is not None:
        _export(Path(out or f"out/{recipe.stem}"), exported)
        return
    settings = load_settings(TrainRecipe, recipe, overrides or [])
    if data:
        keep = settings.sources[0].keep if settings.sources else Filter()
        settings = settings.model_copy(update={"sources": tuple(Source(path, keep=keep) for path in data)})
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


def _export(run: Path, step: int) -> None:
    from train.trainer.run_folder import PIPELINE, checkpoint_of

    checkpoint, folder = checkpoint_of(run, step), run / f"{PIPELINE}-{step:08d}"

    from train.trainer.pipeline import export

    quieten()
    export(checkpoint, folder)
    Console().print(f"pipeline: {folder}", highlight=False, soft_wrap=True)


def ablate(
    recipe: Annotated[Path, typer.Option("--recipe", help="The full model: a YAML file, or a name.")] = RECIPE,
    data: Annotated[str, typer.Option(help="Dataset of images that the runs have not seen.")] = HELD_OUT,
    images: Annotated[int, typer.Option("--images", help="How many of them.", min=2)] = 96,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.", min=1)] = 2,
    labels: Annotated[
        Path,
        typer.Option(help="Recipe (a file or a name) whose detector and segmenter find the subjects in the samples."),
    ] = LABELS,
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and their reports.")] = Path("out/ablation"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting of the recipe.")] = None,
) -> None:
    """Repeats the paper's ablation.

    It trains the model without each of its parts in turn, scores each, and compares.
    """
    require("train")

    from datapipe.recipe import load_recipe
    from subject_diffusion.settings import load_settings
    from train.stream.shard_index import check_there
    from train.trainer.recipe import TrainRecipe
    from train.trainer.run_folder import check_start

    finder = load_recipe(labels)
    settings = load_settings(TrainRecipe, recipe, overrides or [])
    check_there(data)
    check_start(settings)
    if re.match(r"\w+:/", str(out)):
        raise RunError(f"--out {out}: an ablation is written to a local folder; name one")

    from train.evaluation.ablate import SUBJECTS, VARIANTS, Comparison, VariantScore, compare, table
    from train.evaluation.ablate import ablate as run
    from train.evaluation.report import Evaluation

    quieten()
    console = Console()
    asked = Evaluation(data=data, images=images, labels=finder)
    scores: list[VariantScore] = []
    for score in run(settings, out, asked, range(seeds)):
        scores.append(score)
        console.print(f"{score.variant}, seed {score.seed}, {score.subjects} subject(s): scored", highlight=False)
    if len(scores) < seeds * len(VARIANTS) * len(SUBJECTS):
        console.print(f"stopped and saved in {out}; the same command goes on from here", highlight=False)
        return
    cells = compare(scores)
    Comparison(settings, asked, range(seeds), cells).write(out)
    console.print(table(cells))
    console.print(f"report: {out}/report.json", highlight=False, soft_wrap=True)


def quieten() -> None:
    """Loading a dozen small files needs no progress bars, nor warnings about parts of a folder that are not ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
