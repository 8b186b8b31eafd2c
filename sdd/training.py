"""The commands that train the subject model, draw with it and score it: arguments in, one call, what it said out."""

from __future__ import annotations

import io
import re
from collections.abc import Container, Sequence
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

    _quieten()
    console = Console(quiet=not is_first())
    if not launch(settings, out, ray_address):
        console.print(f"stopped and saved in {out}; the same command goes on from here", highlight=False)
        return
    console.print(f"pipeline: {out}/pipeline\npictures: {out}/validation-*.png", highlight=False, soft_wrap=True)


def _export(run: Path, step: int) -> None:
    from train.trainer.run_folder import PIPELINE, checkpoint_of

    checkpoint, folder = checkpoint_of(run, step), run / f"{PIPELINE}-{step:08d}"

    from train.trainer.pipeline import export

    _quieten()
    export(checkpoint, folder)
    Console().print(f"pipeline: {folder}", highlight=False, soft_wrap=True)


def sample(
    prompt: Annotated[str, typer.Argument(help="What to draw; every subject's tag is in it.")],
    subjects: Annotated[
        list[str],
        typer.Option("--subject", metavar="TAG=IMAGE", help="A reference picture: mug=photo.png. Once per subject."),
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
            help="Where to draw the subject, as fractions of width and height: mug=0.1,0.4,0.5,0.9. "
            "[default: where its mask is in its picture, or wherever there is room]",
        ),
    ] = None,
    run: Annotated[
        Path,
        typer.Option("--run", help="Folder of a run of `sdd train`, of one of its checkpoints, or of a pipeline."),
    ] = RUN,
    images: Annotated[int, typer.Option("--images", help="How many to draw.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first; each further one has the next.", min=0)] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: the base's own]", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: the base's own]", min=1)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the pictures. [default: RUN/samples]")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a setting of the run's `validation`: guidance_scale=7.5"),
    ] = None,
) -> None:
    """Draws a prompt with the subjects of reference pictures."""
    require("train")

    from datapipe.shards import Store
    from train.evaluation.pictures import open_picture
    from train.trainer.run_folder import results_folder, trained_model

    pictures = _by_tag("--subject", subjects, "photo.png")
    masked = _by_tag("--mask", masks or [], "mask.png", pictures)
    placed = {tag: _box(tag, text) for tag, text in _by_tag("--box", boxes or [], "0.1,0.4,0.5,0.9", pictures).items()}
    out = out or results_folder(run) / "samples"
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out}: there is a file of that name; name a folder")
    trained_model(run)
    photos = {tag: open_picture(Path(path)) for tag, path in pictures.items()}
    shapes = {tag: open_picture(Path(path)) for tag, path in masked.items()}

    from model import Subject
    from train.evaluation.sample import sample_run

    _quieten()
    cast = [Subject(photo, tag, mask=shapes.get(tag), box=placed.get(tag)) for tag, photo in photos.items()]
    drawn = sample_run(run, prompt, cast, seed, images, (height, width), overrides or [])
    for number, picture in enumerate(drawn, seed):
        sink = io.BytesIO()
        picture.save(sink, "PNG")
        Store(str(out)).put(f"seed-{number}.png", sink.getvalue())
    Console().print(f"pictures: {out}/seed-*.png", highlight=False, soft_wrap=True)


def _by_tag(option: str, given: Sequence[str], example: str, known: Container[str] | None = None) -> dict[str, str]:
    """TAG=VALUE options as a dictionary. known: the only tags that there are. Raises RunError."""
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
    try:
        x1, y1, x2, y2 = (float(side) for side in text.split(","))
    except ValueError:
        raise RunError(f"--box {tag}={text}: write four numbers, as in --box mug=0.1,0.4,0.5,0.9") from None
    return x1, y1, x2, y2


def evaluate(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run of `sdd train`, of one of its checkpoints, or of a pipeline.")
    ] = RUN,
    data: Annotated[str, typer.Option(help="Dataset of images that the run has not seen.")] = HELD_OUT,
    images: Annotated[int, typer.Option("--images", help="How many of them.", min=2)] = 96,
    subjects: Annotated[int, typer.Option(help="Subjects of each; images with fewer are left out.", min=1)] = 1,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", help="Only subjects of this tag, or of these where it is repeated.")
    ] = None,
    labels: Annotated[
        Path,
        typer.Option(help="Recipe (a file or a name) whose detector and segmenter find the subjects in the samples."),
    ] = LABELS,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the report. [default: RUN/evaluation]")] = None,
) -> None:
    """Scores samples against their references.

    Beside them: the base model, and shuffled references.
    """
    require("train")

    from datapipe.recipe import load_recipe
    from train.stream.shard_index import check_there
    from train.trainer.run_folder import results_folder, trained_model

    finder = load_recipe(labels)
    trained_model(run)
    check_there(data)

    from train.evaluation.evaluate import evaluate_run
    from train.evaluation.report import Evaluation

    _quieten()
    out = out or results_folder(run) / "evaluation"
    only = frozenset(tags) if tags else None
    asked = Evaluation(data=data, images=images, subjects=subjects, tags=only, labels=finder)
    report = evaluate_run(run, asked, out)
    console = Console()
    for table in report.tables():
        console.print(table)
    console.print(f"report: {out}/report.json\npictures: {out}/samples.png", highlight=False, soft_wrap=True)


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

    _quieten()
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


def _quieten() -> None:
    """Loading a dozen small files needs no progress bars, nor warnings about parts of a folder that are not ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
