"""The command that draws with a trained model: arguments in, one call, what it said out."""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sdd.training import DEFAULT_MODEL, LABELS, quieten
from subject_diffusion._extras import require
from subject_diffusion._version import __version__
from subject_diffusion.errors import RunError
from subject_diffusion.storage import named_errors

if TYPE_CHECKING:
    from train.sampling.draw import Draftsman
    from train.sampling.drawing import Drawing
    from train.sampling.request import Request
    from train.sampling.settings import Axis

IMAGES = 4
"""Pictures of a prompt, unless told otherwise; of sheets, 1."""


def sample(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to draw; every subject's tag is in it.")] = None,
    subjects: Annotated[
        list[str] | None,
        typer.Option(
            "--subject",
            metavar="TAG=IMAGE,…",
            help="A subject's reference picture, or several of them: mug=photo.png, mug=front.png,side.png. Once per "
            "subject, and again for another of the same tag.",
        ),
    ] = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(
            "--mask",
            metavar="TAG=IMAGE,…",
            help="White where its picture shows the subject; one for each picture. [default: where the picture is "
            "opaque, if some of it is transparent, else as --at finds it]",
        ),
    ] = None,
    places: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            metavar="TAG=X,Y",
            help="A point of the subject in its picture, or its box X1,Y1,X2,Y2, as fractions of width and height, to "
            "cut it out by; with ; between several. [default: the largest that is found by its tag]",
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
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="KEY=V1,V2,…",
            help="Draw a sheet over a setting's values: guidance_scale=3,5,7.5. A second one makes rows: "
            "subject_scale=0,0.5,1.",
        ),
    ] = None,
    interpolate: Annotated[
        int | None,
        typer.Option(
            help="Draw a sheet of N pictures from the subject model alone to the base model alone (alpha from 0 to 1).",
            metavar="N",
            min=2,
        ),
    ] = None,
    lines: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Draw the prompts of a JSON-lines file; see docs/my-model.md."),
    ] = None,
    again: Annotated[
        Path | None,
        typer.Option("--again", metavar="PNG", help="Draw a picture of this command again, to the same pixels."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help=f"Folder of a run of `sdd train`, a checkpoint, or a pipeline. {DEFAULT_MODEL}"),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", help=f"How many to draw. [default: {IMAGES}; of sheets, 1]", min=1)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first; each further one has the next.", min=0, max=2**63 - 1)
    ] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: the base's own]", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: the base's own]", min=1)] = None,
    labels: Annotated[
        Path, typer.Option(help="Recipe (a file or a name) whose detector and segmenter cut references out.")
    ] = LABELS,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the pictures. [default: samples in the run's folder; for a checkpoint or a pipeline, "
            "out/RUN-NAME/samples]",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override how the run's `validation` is sampled: guidance_scale=7.5"),
    ] = None,
) -> None:
    """Draws a prompt with the subjects of reference pictures.

    Pictures that are there already are not drawn again.
    """
    require("train")

    from subject_diffusion.settings import validated
    from train.sampling.request import Request, asked_subjects, axis, read_requests
    from train.sampling.trained import default_model

    if again is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        told = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
        if told - {"again", "run", "out"}:
            raise RunError("--again draws what the picture itself says; only --run and --out may stand beside it")
        _draw_again(again, run, out)
        return
    axes = [axis(text) for text in grid or []]
    if interpolate is not None:
        axes.insert(0, ("alpha", tuple(round(i / (interpolate - 1), 4) for i in range(interpolate))))
    common: dict[str, Any] = {"seed": seed, "height": height, "width": width, "settings": _settings(overrides or [])}
    common["images"] = images or (1 if axes else IMAGES)
    if lines is not None:
        if prompt is not None or subjects or masks or places or boxes:
            raise RunError("--from: prompts and subjects come from the file; leave the prompt and --subject out")
        requests = read_requests(lines, common)
    elif prompt is None:
        raise RunError("a prompt is needed, or --from FILE, or --again PNG")
    else:
        cast = asked_subjects(subjects or [], masks or [], places or [], boxes or [])
        requests = [validated(Request, {"prompt": prompt, "subjects": cast, **common}, (), "the request")]
    _draw(requests, axes, run or default_model(), labels, out, lines)


def _settings(overrides: list[str]) -> dict[str, Any]:
    """`--set` as keys and values. Raises RecipeError."""
    from subject_diffusion.settings import validated
    from train.sampling.settings import SamplingSettings

    keys = [override.partition("=")[0].strip() for override in overrides]
    return validated(SamplingSettings, {}, overrides, "--set").model_dump(include=set(keys))


def _draw(
    requests: list[Request], axes: list[Axis], run: Path, labels: Path, out: Path | None, lines: Path | None
) -> None:
    from datapipe.recipe import load_recipe
    from train.sampling.checking import check_files, check_request
    from train.sampling.trained import find_model
    from train.trainer.run_folder import results_folder

    out = _folder(out or results_folder(run) / "samples")
    named = [(request, f"{lines}, {request.name}: " if lines else "") for request in requests]
    for request, where in named:
        check_files(request, where)
    model, finder = find_model(run), load_recipe(labels)
    for request, where in named:
        check_request(request, model, axes, where)

    from train.sampling.draw import Draftsman, Masks, file_name, tasks

    console, digest = Console(), model.digest()
    to_do = tasks(requests, axes, finder, model, digest, out)
    if skipped := sum(request.images for request in requests) - len(to_do):
        console.print(f"already in {out}: {skipped} of them", highlight=False, soft_wrap=True)
    if to_do:
        quieten()
        draftsman, masks = Draftsman(model, str(run), digest), Masks(finder)
        drawings = [draftsman.drawing(task, axes, masks) for task in to_do]
        _write(draftsman, drawings, [task.path for task in to_do])
    console.print(f"pictures: {out}/{file_name('*' if lines else '', '*', axes)}", highlight=False, soft_wrap=True)


def _draw_again(picture: Path, run: Path | None, out: Path | None) -> None:
    from train.sampling.checking import check_axes, check_unchanged
    from train.sampling.drawing import read_drawing
    from train.sampling.trained import find_model
    from train.trainer.run_folder import results_folder

    drawing = read_drawing(picture)
    check_axes(drawing.settings, drawing.axes)
    run = run or Path(drawing.model)
    path = _again_path(_folder(out or results_folder(run) / "samples"), picture.stem, drawing)
    model = find_model(run)
    check_unchanged(drawing, model, picture)

    import torch

    from train.sampling.draw import Draftsman

    quieten()
    draftsman = Draftsman(model, str(run), drawing.model_sha256)
    torch.set_num_threads(drawing.threads)
    here = {"version": __version__, "torch": torch.__version__, "device": draftsman.device}
    for what, now in here.items():
        if (then := getattr(drawing, what)) != now:
            print(f"{picture}: drawn with {what} {then}, here {now}: pixels may differ by rounding", file=sys.stderr)
    _write(draftsman, [drawing], [path])
    Console().print(f"picture: {path}", highlight=False, soft_wrap=True)


def _again_path(folder: Path, stem: str, drawing: Drawing) -> Path:
    """A name that is free, or that of the same picture: pictures of several folders may share theirs."""
    from train.sampling.drawing import read_drawing

    for number in itertools.count(1):
        path = folder / f"{stem}-again{f'-{number}' if number > 1 else ''}.png"
        if not path.exists():
            return path
        with contextlib.suppress(RunError):
            if read_drawing(path) == drawing:
                return path
    raise AssertionError("there are infinitely many names")


def _write(draftsman: Draftsman, drawings: Sequence[Drawing], paths: Sequence[Path]) -> None:
    from train.sampling.draw import steps
    from train.sampling.drawing import write_picture

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=sum(map(steps, drawings)))
        for number, (drawing, path) in enumerate(zip(drawings, paths, strict=True), 1):
            progress.update(bar, description=f"drawing {number} of {len(drawings)}")
            picture = draftsman.draw(drawing, lambda: progress.advance(bar))
            with named_errors(str(path), RunError):
                write_picture(path, picture, drawing)


def _folder(out: Path) -> Path:
    """The folder, which can be written, or can be made. Raises RunError."""
    with named_errors(f"--out {out}", RunError):
        if out.exists() and not out.is_dir():
            raise RunError(f"--out {out}: there is a file of that name; name a folder")
        there = next(folder for folder in (out, *out.parents) if folder.exists())
        tempfile.TemporaryFile(dir=there).close()
    return out
