"""`sdd`: the commands, and the one place where an error of the user's becomes one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from datapipe.errors import SddError
from sdd import looking, training

if TYPE_CHECKING:
    from datapipe.shards import Store

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

TOY_RECIPE = Path("manifests/recipes/toy.yaml")
CONTACT_SHEET = "contact-sheet.png"
CONTACT_SHEET_IMAGES = 16


def main() -> None:
    """Entry point of `sdd`."""
    try:
        app()
    except SddError as error:
        print(f"sdd: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    except KeyboardInterrupt:
        print("sdd: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


@app.callback()
def _sdd() -> None:
    """Web images become a dataset of subjects: captions, tags, boxes and masks in WebDataset shards."""


@app.command()
def dataset(
    recipe: Annotated[Path, typer.Option("--recipe", help="The YAML file that settles the run.")] = TOY_RECIPE,
    source: Annotated[
        str | None,
        typer.Option("--input", help="URL table (parquet, csv, json), img2dataset tars, or an image folder."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder for the shards, local, s3:// or gs://. [default: out/RECIPE]")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: auto or host:port. [default: Ray on this machine]", envvar="RAY_ADDRESS"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: select.min_score=0.4")
    ] = None,
) -> None:
    """Makes every shard that is missing. Killed and run again, it goes on where it was."""
    from datapipe.inspect import summarise
    from datapipe.recipe import load_recipe
    from datapipe.run import run
    from datapipe.schema import IDENTITIES
    from datapipe.shards import Store
    from datapipe.sources import open_source
    from toyworld.identities import write_identities
    from toyworld.score import score_against_truth
    from toyworld.web import served

    settings = load_recipe(recipe, overrides or [])
    out = out or f"out/{recipe.stem}"
    console = Console()
    with contextlib.ExitStack() as open_resources:
        web = None
        if source is None and settings.toyworld is not None:
            web = open_resources.enter_context(served(settings.toyworld, Path("out")))
            source = str(web.table)
        settings = settings.model_copy(
            update={"source": settings.source.model_copy(update={"path": source or settings.source.path})}
        )
        worked = run(settings, open_source(settings.source, scratch=out), out, ray_address)
    if not worked:
        console.print(f"every shard is already in {out}: nothing to do", highlight=False, soft_wrap=True)
    store = Store(out)
    console.print(summarise(store).funnel())
    if web is not None:
        console.print(score_against_truth(store, web.truth))
        if worked or not store.exists(IDENTITIES):
            write_identities(store, web)
    if worked:
        _save_contact_sheet(store)
    console.print(f"shards: {out}\ncontact sheet: {out}/{CONTACT_SHEET}", highlight=False, soft_wrap=True)


def _save_contact_sheet(store: Store) -> None:
    """Draws the first kept images, so that the first look needs no further command."""
    from datapipe.inspect import contact_sheet
    from datapipe.shards import kept_samples

    samples = list(itertools.islice(kept_samples(store), CONTACT_SHEET_IMAGES))
    if samples:
        sink = io.BytesIO()
        contact_sheet(samples).save(sink, "PNG")
        store.put(CONTACT_SHEET, sink.getvalue())


@app.command()
def recipe(
    markdown: Annotated[bool, typer.Option(help="As the Markdown of manifests/recipes/README.md.")] = False,
) -> None:
    """Every recipe key with its type, default and meaning."""
    from datapipe.recipe import Recipe
    from datapipe.settings import Settings, describe
    from train.recipe import TrainRecipe

    kinds: dict[str, type[Settings]] = {"Datasets (`sdd dataset`)": Recipe, "Training (`sdd train`)": TrainRecipe}
    if markdown:
        print("# Recipe keys\n\nWritten by `sdd recipe --markdown`.")
    for title, kind in kinds.items():
        rows = list(describe(kind))
        if markdown:
            print(f"\n## {title}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |")
            for row in rows:
                print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
            continue
        table = Table("key", "type", "default", "meaning", box=None, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


for command in (
    looking.inspect,
    looking.verify,
    looking.reselect,
    looking.report,
    looking.card,
    looking.diff,
    looking.audit,
    looking.export,
    training.train,
    training.sample,
    training.evaluate,
    training.ablate,
):
    app.command()(command)
app.command("import")(looking.import_labels)
