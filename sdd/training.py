"""The commands that train the subject model, draw with it and score it: arguments in, one call, what it said out."""

from __future__ import annotations

import io
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

RECIPE = Path("manifests/recipes/train-toy.yaml")
RUN = Path("out/train-toy")
HELD_OUT = "out/toy-held-out"
LABELS = Path("manifests/recipes/toy.yaml")


def train(
    recipe: Annotated[Path, typer.Option("--recipe", help="The YAML file that settles the run.")] = RECIPE,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Dataset folder or tars, in the place of `sources`; the filter stays."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for checkpoints, pictures and the pipeline. [default: out/RECIPE]"),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster, for run.workers > 1. [default: Ray on this machine]", envvar="RAY_ADDRESS"),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: optimizer.lr=1e-4")] = None,
) -> None:
    """Trains the subject model. Stopped and run again, it goes on where it was, with the same losses."""
    from datapipe.settings import load_settings
    from train.index import Filter
    from train.launch import train as launch
    from train.reader import Source
    from train.recipe import TrainRecipe

    _quieten()
    settings = load_settings(TrainRecipe, recipe, overrides or [])
    if data:
        keep = settings.sources[0].keep if settings.sources else Filter()
        settings = settings.model_copy(update={"sources": tuple(Source(path, keep=keep) for path in data)})
    out = out or Path("out") / recipe.stem
    console = Console()
    if not launch(settings, out, ray_address):
        console.print(f"stopped and saved in {out}; the same command goes on from here", highlight=False)
        return
    console.print(f"pipeline: {out}/pipeline\npictures: {out}/validation-*.png", highlight=False, soft_wrap=True)


def sample(
    prompt: Annotated[str, typer.Argument(help="What to draw; every subject's tag is in it.")],
    subjects: Annotated[
        list[str],
        typer.Option("--subject", metavar="TAG=IMAGE", help="A reference picture: mug=photo.png. Once a subject."),
    ],
    masks: Annotated[
        list[str] | None,
        typer.Option(
            "--mask",
            metavar="TAG=IMAGE",
            help="White where its picture shows the subject. [default: where the picture is opaque]",
        ),
    ] = None,
    boxes: Annotated[
        list[str] | None,
        typer.Option(
            "--box",
            metavar="TAG=X1,Y1,X2,Y2",
            help="Where to draw the subject, in shares of the width and height: mug=0.1,0.4,0.5,0.9. "
            "[default: where its mask is in its picture, or wherever there is room]",
        ),
    ] = None,
    run: Annotated[Path, typer.Option("--run", help="Folder of a run of `sdd train` that has ended.")] = RUN,
    images: Annotated[int, typer.Option("--images", help="How many to draw.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of the first; each further one has the next.", min=0)] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: the base's own]", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: the base's own]", min=1)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the pictures. [default: RUN/samples]")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a setting of the run's `validation`: guidance_scale=7.5"),
    ] = None,
) -> None:
    """Draws a prompt with the subjects of reference pictures."""
    from datapipe.errors import RunError
    from datapipe.shards import Store
    from train.sampling import load_subject, sample_run

    _quieten()
    pictures = _by_tag("--subject", subjects, "photo.png")
    masked = _by_tag("--mask", masks or [], "mask.png", pictures)
    placed = {tag: _box(tag, text) for tag, text in _by_tag("--box", boxes or [], "0.1,0.4,0.5,0.9", pictures).items()}
    cast = [
        load_subject(tag, Path(path), Path(masked[tag]) if tag in masked else None, placed.get(tag))
        for tag, path in pictures.items()
    ]
    out = out or run / "samples"
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out}: there is a file of that name; name a folder")
    drawn = sample_run(run, prompt, cast, seed, images, (height, width), overrides or [])
    for number, picture in enumerate(drawn, seed):
        sink = io.BytesIO()
        picture.save(sink, "PNG")
        Store(str(out)).put(f"seed-{number}.png", sink.getvalue())
    Console().print(f"pictures: {out}/seed-*.png", highlight=False, soft_wrap=True)


def _by_tag(option: str, given: Sequence[str], example: str, known: Container[str] | None = None) -> dict[str, str]:
    """TAG=VALUE options as a dictionary. known: the only tags that there are. Raises RunError."""
    from datapipe.errors import RunError

    found: dict[str, str] = {}
    for text in given:
        tag, _, value = text.partition("=")
        if not tag or not value:
            raise RunError(f"{option} {text}: write the tag, = and the value, as in {option} mug={example}")
        if tag in found:
            raise RunError(f"{option} {text}: {tag} comes twice; call one of them otherwise, here and in the prompt")
        if known is not None and tag not in known:
            raise RunError(f"{option} {text}: no --subject is called {tag}")
        found[tag] = value
    return found


def _box(tag: str, text: str) -> tuple[float, float, float, float]:
    from datapipe.errors import RunError

    try:
        x1, y1, x2, y2 = (float(side) for side in text.split(","))
    except ValueError:
        raise RunError(f"--box {tag}={text}: write four numbers, as in --box mug=0.1,0.4,0.5,0.9") from None
    return x1, y1, x2, y2


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `sdd train` that has ended.")] = RUN,
    data: Annotated[str, typer.Option(help="Dataset of images that the run has not seen.")] = HELD_OUT,
    images: Annotated[int, typer.Option("--images", help="How many of them.", min=2)] = 96,
    subjects: Annotated[int, typer.Option(help="Subjects of each; images with fewer are left out.", min=1)] = 1,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", help="Only subjects of this tag, or of these where it comes again.")
    ] = None,
    labels: Annotated[
        Path, typer.Option(help="Recipe whose detector and segmenter find the subjects in the samples.")
    ] = LABELS,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the report. [default: RUN/evaluation]")] = None,
) -> None:
    """Scores samples against their references, beside the base model and beside shuffled references."""
    from datapipe.recipe import load_recipe
    from train.evaluate import Evaluation, evaluate_run, tables

    _quieten()
    out = out or run / "evaluation"
    only = frozenset(tags) if tags else None
    asked = Evaluation(data=data, images=images, subjects=subjects, tags=only, labels=load_recipe(labels))
    groups = evaluate_run(run, asked, out)
    console = Console()
    for table in tables(groups):
        console.print(table)
    console.print(f"report: {out}/report.json\npictures: {out}/samples.png", highlight=False, soft_wrap=True)


def ablate(
    recipe: Annotated[Path, typer.Option("--recipe", help="Of the full model.")] = RECIPE,
    data: Annotated[str, typer.Option(help="Dataset of images that the runs have not seen.")] = HELD_OUT,
    images: Annotated[int, typer.Option("--images", help="How many of them.", min=2)] = 96,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.", min=1)] = 2,
    labels: Annotated[
        Path, typer.Option(help="Recipe whose detector and segmenter find the subjects in the samples.")
    ] = LABELS,
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and their reports.")] = Path("out/ablation"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting of the recipe.")] = None,
) -> None:
    """Trains the model without each of its parts, as the paper's ablation does, and compares."""
    from datapipe.recipe import load_recipe
    from datapipe.settings import load_settings
    from train.ablate import SUBJECTS, VARIANTS, Score, compare, table, write_comparison
    from train.ablate import ablate as run
    from train.evaluate import Evaluation
    from train.recipe import TrainRecipe

    _quieten()
    console = Console()
    settings = load_settings(TrainRecipe, recipe, overrides or [])
    asked = Evaluation(data=data, images=images, labels=load_recipe(labels))
    scores: list[Score] = []
    for score in run(settings, out, asked, range(seeds)):
        scores.append(score)
        console.print(f"{score.variant}, seed {score.seed}, {score.subjects} subject(s): scored", highlight=False)
    if len(scores) < seeds * len(VARIANTS) * len(SUBJECTS):
        console.print(f"stopped and saved in {out}; the same command goes on from here", highlight=False)
        return
    cells = compare(scores)
    write_comparison(settings, asked, range(seeds), cells, out)
    console.print(table(cells))
    console.print(f"report: {out}/report.json", highlight=False, soft_wrap=True)


def _quieten() -> None:
    """Loading a dozen small files needs no progress bars, nor word of a folder's parts that are somebody else's."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
