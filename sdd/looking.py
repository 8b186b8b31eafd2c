"""The commands that look into datasets and make new ones of them: arguments in, one call, what it said out."""

from __future__ import annotations

import contextlib
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, track

from datapipe.errors import ShardError
from datapipe.schema import Outcome, clean_text

if TYPE_CHECKING:
    from datapipe.shards import Store


class ExportFormat(str, Enum):
    COCO = "coco"
    PARQUET = "parquet"


Folder = Annotated[str, typer.Argument(metavar="PATH", help="A dataset folder: local, s3:// or gs://.")]


def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A dataset folder, a shard, or any WebDataset tar: local, s3:// or gs://."),
    ],
    shard: Annotated[int | None, typer.Option(help="Only this shard.")] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL",
            help="List the rows that match a condition of DuckDB's SQL over the sidecar's columns, `shard` and "
            '`entities`: "reason = \'too_small\'", "len(entities) > 2".',
        ),
    ] = None,
    candidates: Annotated[
        bool,
        typer.Option(
            "--candidates",
            help="The rows are candidate boxes, with tag, score, text_score, area, aspect, box, mask, and as reason "
            "why they are no entity: \"reason = 'area'\".",
        ),
    ] = False,
    entity: Annotated[str | None, typer.Option(metavar="TAG", help="Only images that hold it; it alone drawn.")] = None,
    sample: Annotated[str | None, typer.Option(metavar="KEY", help="Only this sample: its facts and picture.")] = None,
    random: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="So many at random, of those that match or were kept.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --random: the same seed, the same choice.")] = 0,
    save: Annotated[
        Path | None,
        typer.Option(help="Draw into this PNG: one sample, or a sheet of the first 64."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: one JSON object a line.")] = False,
) -> None:
    """Tables of what is in a dataset; or rows, samples and pictures of it, in the terminal where it can show any."""
    from datapipe.inspect import Ask
    from datapipe.inspect import inspect as show

    ask = Ask(shard, where, candidates, entity, sample, random, seed, save, as_json)
    show(path, ask, Console())


def verify(
    path: Folder,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove the temporary files of killed writers, and nothing else.")
    ] = False,
) -> None:
    """Checks every hash, count, span, box and mask against the manifests. Exit code 0: all is well; 1: it is not."""
    from datapipe.shards import Store, present
    from datapipe.shards import verify as problems_of

    store = Store(path, create=False)
    shards = present(store, "shard")
    if not shards and not present(store, "raw"):
        raise ShardError(f"{path}: no shards here; `sdd dataset --out {path}` makes them")
    if repair:
        with store.lock():
            for name in store.clear_temporaries():
                _say(f"removed {name}")
    found = 0
    for problem in problems_of(store):
        found += 1
        _say(f"{problem.file}: {problem.what}")
    _say(f"{path}: {len(shards)} shards, {f'{found} problems' if found else 'all well'}")
    raise typer.Exit(1 if found else 0)


def reselect(
    path: Folder,
    out: Annotated[str, typer.Option("--out", help="Folder for the new dataset: local, s3:// or gs://.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of selection: select.min_score=0.4")
    ] = None,
) -> None:
    """Makes a dataset with other thresholds from the recorded candidates: no model, and no image is decoded."""
    from datapipe.inspect import count_manifests, summarise
    from datapipe.reselect import reselect as run
    from datapipe.shards import Store

    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        bar = progress.add_task("selecting", total=None)
        for done, shards in run(path, overrides or [], out):
            progress.update(bar, completed=done, total=shards)
    store = Store(out)
    Console().print(count_manifests(store), "", summarise(store).funnel())
    _say(f"shards: {out}")


def report(
    path: Folder,
    save: Annotated[Path | None, typer.Option(help="Where the page goes. [default: PATH/report.html]")] = None,
    seed: Annotated[int, typer.Option(help="The same seed shows the same images.")] = 0,
) -> None:
    """Writes one HTML page to look through offline: funnel, distributions, galleries of kept, lost and edge cases."""
    from datapipe.inspect.report import REPORT_FILE
    from datapipe.inspect.report import report as page
    from datapipe.shards import Store

    store = Store(path, create=False)
    _put(store, REPORT_FILE, page(store, seed), save)


def card(
    path: Folder,
    save: Annotated[Path | None, typer.Option(help="Where the card goes. [default: PATH/README.md]")] = None,
) -> None:
    """Writes the dataset card of the Hugging Face hub: numbers, recipe, models, licences, opt-outs, known limits."""
    from datapipe.inspect.card import CARD_FILE
    from datapipe.inspect.card import card as page
    from datapipe.shards import Store

    store = Store(path, create=False)
    _put(store, CARD_FILE, page(store), save)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A dataset folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, made from the same input.")],
    save: Annotated[Path | None, typer.Option(help="Write a page with pictures here (HTML).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed shows the same images.")] = 0,
) -> None:
    """What two runs with other recipes or models kept, labelled otherwise, and lost."""
    from datapipe.inspect.diff import diff as compare
    from datapipe.inspect.diff import diff_page
    from datapipe.shards import Store

    one, other = Store(a, create=False), Store(b, create=False)
    difference = compare(one, other, seed)
    if as_json:
        print(json.dumps(difference.to_json()))
    else:
        Console().print(difference)
    if save is not None:
        _put(one, save.name, diff_page(one, other, difference), save)


def export(
    path: Folder,
    to: Annotated[ExportFormat, typer.Option(help="coco: JSON and JPEG files; parquet: images in the tables.")],
    out: Annotated[str, typer.Option("--out", help="Folder for it: local, s3:// or gs://.")],
) -> None:
    """Writes the kept images and their entities in a format that other tools read."""
    from datapipe.inspect import count_manifests
    from datapipe.inspect.export import export_coco, export_parquet
    from datapipe.shards import Store

    store = Store(path, create=False)
    totals = count_manifests(store)
    write = export_coco if to is ExportFormat.COCO else export_parquet
    screen = Console(stderr=True)
    for _ in track(
        write(store, out), "exporting", totals.shards, console=screen, disable=not screen.is_terminal, transient=True
    ):
        pass
    _say(f"{out}: {totals.outcomes[Outcome.KEPT]:,} images")


def import_labels(
    labels: Annotated[
        Path, typer.Argument(help="COCO's instances (JSON), or Open Images' table of boxes (CSV), told by the ending.")
    ],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the dataset: local, s3:// or gs://.")],
    captions: Annotated[Path | None, typer.Option(help="COCO: its captions (JSON). [default: made of names]")] = None,
    classes: Annotated[Path | None, typer.Option(help="Open Images: its class descriptions (CSV).")] = None,
    masks: Annotated[Path | None, typer.Option(help="Open Images: its table of masks (CSV), PNGs beside it.")] = None,
    slice_rows: Annotated[int, typer.Option(min=1, help="Images of a shard.")] = 1000,
) -> None:
    """Makes shards of images that people have labelled, without a model. (Tars of img2dataset: `sdd dataset`.)"""
    from datapipe.errors import SourceError
    from datapipe.inspect import count_manifests
    from datapipe.labelled import digest_of, import_images, read_coco, read_openimages
    from datapipe.shards import Store

    if labels.suffix == ".json":
        rows = read_coco(labels, images, captions)
    elif classes is not None:
        rows = read_openimages(labels, classes, images, masks)
    else:
        raise SourceError(f"{labels}: the boxes of Open Images need their class descriptions, --classes FILE.csv")
    store = Store(out)
    screen = Console(stderr=True)
    digest = digest_of(path for path in (labels, captions, classes, masks) if path is not None)
    shards = import_images(rows, labels.name, digest, store, slice_rows)
    for _ in track(shards, "importing", console=screen, disable=not screen.is_terminal, transient=True):
        pass
    Console().print(count_manifests(store))
    _say(f"shards: {out}")


def audit(
    path: Folder,
    images: Annotated[int, typer.Option("-n", "--images", min=1, help="How many to draw.")] = 200,
    seed: Annotated[int, typer.Option(help="Another one draws others.")] = 0,
    port: Annotated[int, typer.Option(help="Of the page, on this machine. [default: a free one]")] = 0,
    results: Annotated[bool, typer.Option("--results", help="Only say what was marked so far.")] = False,
) -> None:
    """Asks a person, in a browser and by the arrow keys, what is right of a sample; keeps the marks in PATH/audit.json
    and says each stage's precision."""
    import dataclasses
    import webbrowser

    from datapipe.inspect.audit import AUDIT_FILE, accepted, audit_page, draw, open_audit, precision_table, questions
    from datapipe.inspect.desk import serving
    from datapipe.shards import Store

    store = Store(path, create=False)
    begun = open_audit(store, images, seed)
    samples = draw(store, images, seed)
    asked = questions(samples)

    def receive(marks: object) -> None:
        nonlocal begun
        begun = dataclasses.replace(begun, marks=accepted(marks, asked))
        store.put(AUDIT_FILE, begun.to_json())

    if not results:
        with serving(audit_page(store, begun, samples), receive, port) as (address, done):
            _say(f"{address}  (Ctrl-C ends here, or `done` there; the same command goes on)")
            webbrowser.open(address)
            with contextlib.suppress(KeyboardInterrupt):
                done.wait()
    Console().print(precision_table(begun, len(asked)))


def _put(store: Store, name: str, text: str, save: Path | None) -> None:
    """Into the dataset folder, or where the user wants it."""
    from datapipe.errors import RunError
    from datapipe.shards.store import named_errors

    data = text.encode()
    if save is None:
        store.put(name, data)
    else:
        with named_errors(str(save), RunError):
            save.write_bytes(data)
    _say(f"{save or f'{store.root}/{name}'}: {len(data) / 1e6:.2f} MB")


def _say(text: str) -> None:
    """A line that may hold text of the web, which is not let near the terminal's control codes."""
    Console().print(clean_text(text), highlight=False, markup=False, soft_wrap=True)
