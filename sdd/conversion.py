"""The commands that make something else of a dataset, or a dataset of something else: arguments in, one call, what it
said out."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, track

from datapipe.schema import Outcome
from sdd.console import DatasetFolder, say
from subject_diffusion.errors import SourceError


class ExportFormat(str, Enum):
    AI_TOOLKIT = "ai-toolkit"
    COCO = "coco"
    DIFFSYNTH = "diffsynth"
    FLUX3 = "flux3"
    HF = "hf"
    IDEOGRAM4 = "ideogram4"
    MUSUBI = "musubi"
    PARQUET = "parquet"
    SIMPLETUNER = "simpletuner"
    WEBSHART = "webshart"
    YOLO = "yolo"


def export(
    path: DatasetFolder,
    to: Annotated[
        ExportFormat,
        typer.Option(
            help="coco: JSON and JPEG files; parquet: images in the tables; hf: a repository for the Hugging Face hub; "
            "yolo: polygons for Ultralytics; flux3, ideogram4: captions with the subjects' boxes; simpletuner: "
            "captions, boxes and masks; ai-toolkit, diffsynth, musubi: images with their subjects as references; "
            "webshart: an index of the tars."
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="Folder for it: local, s3:// or gs://.")],
) -> None:
    """Writes the kept images in a format that other tools read."""
    from datapipe.formats import WRITERS, Faults
    from datapipe.inspect import count_manifests
    from datapipe.shards import Store

    store = Store(path, create=False)
    totals = count_manifests(store)
    screen, faults = Console(stderr=True), Faults()
    for _ in track(
        WRITERS[to.value](store, out, faults),
        "exporting",
        totals.shards,
        console=screen,
        disable=not screen.is_terminal,
        transient=True,
    ):
        pass
    for line in faults.lines():
        say(f"samples: {line}")
    say(f"{out}: {totals.outcomes[Outcome.KEPT] - faults.total:,} images")


def import_labels(
    labels: Annotated[
        Path,
        typer.Argument(
            help="COCO's instances or Label Studio's export (.json), CVAT's (.xml), Open Images' boxes (.csv), YOLO's "
            "data.yaml, or a folder of YOLO's .txt or Pascal VOC's .xml files."
        ),
    ],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the dataset: local, s3:// or gs://.")],
    captions: Annotated[
        Path | None, typer.Option(help="COCO: its captions (JSON). [default: made of the names]")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Open Images: its class descriptions (CSV). YOLO: names, one a line, or YAML."),
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Open Images: its table of masks (CSV), PNGs beside it.")] = None,
    slice_rows: Annotated[int, typer.Option(min=1, help="Images per shard.")] = 1000,
) -> None:
    """Makes shards of images that people have labeled.

    No model is needed. What is wrong with a label costs that label, and is counted and named at the end. (For tars of
    img2dataset: `sdd dataset`.)
    """
    from datapipe.formats import Faults, digest_of, read_labels
    from datapipe.inspect import count_manifests, summarize
    from datapipe.labeled import import_images
    from datapipe.shards import Store

    if not images.is_dir():
        raise SourceError(f"--images {images}: no such folder; name the one that the labels' image files are in")
    faults = Faults()
    screen = Console(stderr=True)
    with read_labels(labels, images, faults, captions, classes, masks) as (rows, files):
        store = Store(out)
        shards = import_images(rows, labels.name, digest_of(files), store, slice_rows, faults)
        for _ in track(shards, "importing", console=screen, disable=not screen.is_terminal, transient=True):
            pass
    Console().print(count_manifests(store), "", summarize(store).funnel())
    for line in faults.lines():
        say(f"labels: {line}")
    say(f"shards: {out}")


def reselect(
    path: DatasetFolder,
    out: Annotated[str, typer.Option("--out", help="Folder for the new dataset: local, s3:// or gs://.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of selection: select.min_score=0.4")
    ] = None,
) -> None:
    """Makes a dataset with other thresholds, without a model.

    It selects anew from the candidates that the sidecars hold. No image is decoded.
    """
    from datapipe.inspect import count_manifests, summarize
    from datapipe.reselect import reselect as run
    from datapipe.shards import Store

    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        bar = progress.add_task("selecting", total=None)
        for done, shards in run(path, overrides or [], out):
            progress.update(bar, completed=done, total=shards)
    store = Store(out)
    Console().print(count_manifests(store), "", summarize(store).funnel())
    say(f"shards: {out}")
