"""`sdd`: the commands, and the one place where an error of the user's becomes one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from datapipe.schema import printable
from sdd import conversion, demo, evaluation, inspection, pairing, planning, sampling, training
from subject_diffusion._extras import help_for
from subject_diffusion._version import __version__
from subject_diffusion.errors import RecipeError, RunError, SddError, one_line
from subject_diffusion.packaged import recipe_names, recipe_path
from subject_diffusion.settings import Described, Settings, also_called, describe

if TYPE_CHECKING:
    from datapipe.inspect import Summary
    from datapipe.machine import Check
    from datapipe.schema import Reason
    from datapipe.shards import Store
    from datapipe.sources import InputRows
    from toyworld.recipe import ToyRecipe
    from toyworld.server import ToyWeb

EXIT_CODES = (
    "Exit codes: 0, done; 1, `verify` found problems; 2, it cannot be done, and one line says why; 130, Ctrl-C; "
    "143, SIGTERM."
)

# No markup in help: rich would read `[default: ...]` as a style, and leave it out.
app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
)

UsageError: Any = typer.BadParameter.__base__
"""A command with words that it does not know. Of this kind typer exports one error only."""
TYPERS_STOPPED = 130
"""What typer makes of a KeyboardInterrupt."""

TOY_RECIPE = Path("toy")
TOY_MODELS_ALONE = (
    "the toy models know the 32 nouns of the drawn toy world; what they make of other pictures means nothing "
    "(--recipe sdd has the paper's models)"
)
CONTACT_SHEET = "contact-sheet.png"
CONTACT_SHEET_IMAGES = 16


def main() -> None:
    """Runs the command of `sys.argv`. Raises KeyboardInterrupt when it is stopped, else SystemExit."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        _refuse(_usage(error))
    except SddError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        line = help_for(error, "label" if sys.argv[1:2] in (["dataset"], ["doctor"], ["plan"]) else "train")
        if line is None:
            raise
        _refuse(line)
    except BrokenPipeError:
        sys.exit(0)
    if code == TYPERS_STOPPED:
        raise KeyboardInterrupt
    sys.exit(code)


def _refuse(lines: str) -> None:
    for line in lines.splitlines():
        print(f"sdd: {printable(line)}", file=sys.stderr)
    sys.exit(2)


def _usage(error: Any) -> str:
    """What is wrong with a command's words, in a line like any other refusal."""
    what = error.format_message().replace("Value error, ", "").rstrip(".")
    command = error.ctx.command_path if error.ctx else "sdd"
    return f"{one_line(what)}; {_set_instead(error)}see `{command} --help`"


def _set_instead(error: Any) -> str:
    """For an option that another tool has, and that is a recipe's key here."""
    option = getattr(error, "option_name", None)
    if option is None or sys.argv[1] != "dataset":
        return ""
    from datapipe.recipe import Recipe

    key = dict(also_called(Recipe)).get(option.lstrip("-").replace("-", "_"))
    return f"here it is --set {key}=…; " if key else ""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sdd {__version__}")
        raise typer.Exit


@app.callback()
def _sdd(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Web images become a dataset of subjects: captions, tags, boxes and masks in WebDataset shards."""


@app.command()
def dataset(
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="The run: a YAML file, or a bundled recipe: toy, sdd, modern or sam3. [default: toy, on its own web]",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--input", help="Table of URLs, images or paths (parquet, csv, json, …), tars, or an image folder."
        ),
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
    append: Annotated[
        bool, typer.Option("--append", help="Add the input, or its new rows, to what OUT holds of others.")
    ] = False,
    retry: Annotated[
        str | None,
        typer.Option(
            "--retry",
            help="Do rows of OUT again that may go well now: transient, or any of http_status,unreachable,timeout,"
            "no_answer.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse an input of which any row or file cannot be read.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first rows as they will be read, and stop.")
    ] = False,
) -> None:
    """Makes every missing shard. When killed and run again, it continues where it was."""
    if recipe is None and source is not None and not dry_run:
        raise RecipeError(
            f"--input {source}: say which models label it: --recipe sdd, --recipe modern, or a YAML file of your own; "
            "the default, toy, knows drawn pictures only"
        )
    if retry is not None and (source is not None or append):
        raise RecipeError("--retry does rows of OUT again; leave --input and --append out")
    if append and source is None:
        raise RecipeError("--append adds an input to OUT; name it with --input")
    recipe = recipe or TOY_RECIPE
    out = out or f"out/{recipe.stem}"
    if not dry_run:
        print(f"recipe {recipe}, into {out}", flush=True)

    from subject_diffusion.settings import load_settings
    from toyworld.recipe import ToyRecipe

    settings = load_settings(ToyRecipe, recipe, [*(overrides or []), *(["source.strict=true"] if strict else [])])
    refusal = None if dry_run else _check_machine(out)
    if retry is not None:
        if refusal is not None:
            raise refusal
        from datapipe.growing import reasons_to_retry

        _retry_rows(settings, reasons_to_retry(retry), out, ray_address)
    else:
        _make_dataset(settings, source, out, ray_address, append, dry_run, refusal)


def _check_machine(out: str) -> RunError | None:
    """Says what is wrong with this machine or with OUT, and nothing where all is well. Returns why OUT cannot be
    written, if it holds a dataset: that may be complete. Raises RunError."""
    from datapipe.machine import check_machine, check_out
    from datapipe.shards import RUN_FILE, Store

    _heed(check_machine())
    try:
        _heed(check_out(out))
    except RunError as refusal:
        with contextlib.suppress(RunError):
            if Store(out, create=False).exists(RUN_FILE):
                return refusal
        raise
    return None


def _heed(checks: Iterable[Check]) -> None:
    for check in checks:
        if check.level == "FAIL":
            raise RunError(check.text)
        if check.level == "warn":
            print(check, file=sys.stderr)


def _retry_rows(settings: ToyRecipe, reasons: Sequence[Reason], out: str, ray_address: str | None) -> None:
    from datapipe.shards import RUN_FILE, Store
    from toyworld.server import served

    store = Store(out, create=False)
    if not store.exists(RUN_FILE):
        raise RunError(f"{out}: no dataset here, so that there is nothing to retry; run without --retry first")
    with contextlib.ExitStack() as open_resources:
        web = open_resources.enter_context(served(settings.toyworld, Path("out"))) if settings.toyworld else None
        from datapipe.run import run  # as below

        worked = run(settings, None, out, ray_address, retry=reasons)
    _report_run(store, out, worked, web)


def _make_dataset(
    settings: ToyRecipe,
    source: str | None,
    out: str,
    ray_address: str | None,
    append: bool,
    dry_run: bool,
    refusal: RunError | None,
) -> None:
    """`refusal`: why OUT, which holds a dataset, cannot be written."""
    from datapipe.plan import refuse_other_formats
    from datapipe.shards import Store
    from datapipe.shards.store import LOCK_FILE
    from datapipe.sources import open_source, preview
    from datapipe.sources.preview import ROWS
    from datapipe.sources.row_index import INDEX_FOLDER
    from toyworld.server import served

    console = Console()
    with contextlib.ExitStack() as open_resources:
        web = None
        if source is None and settings.toyworld is not None:
            web = open_resources.enter_context(served(settings.toyworld, Path("out")))
            source = str(web.table)
        reading = settings.source.model_copy(update={"path": source or settings.source.path})
        # A dry run leaves nothing behind, not even the index of its input.
        only_read = dry_run or refusal is not None
        scratch = open_resources.enter_context(tempfile.TemporaryDirectory()) if only_read else out
        if not dry_run:
            store = Store(out)
            refuse_other_formats(store)
            open_resources.enter_context(store.as_it_was(LOCK_FILE, INDEX_FOLDER))
        rows = open_source(reading, scratch, ROWS if dry_run else None)
        for line in rows.described():
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        if dry_run:
            console.print(preview(rows))
            return
        is_foreign = settings.toyworld is not None and web is None
        if is_foreign:
            console.print(TOY_MODELS_ALONE, style="yellow", highlight=False)
        settings = settings.model_copy(update={"source": reading})
        worked = _run(settings, rows, out, ray_address, append, refusal)
    _report_run(Store(out), out, worked, web)
    if is_foreign:
        console.print(TOY_MODELS_ALONE, style="yellow", highlight=False)


def _run(
    settings: ToyRecipe, rows: InputRows, out: str, ray_address: str | None, append: bool, refusal: RunError | None
) -> bool:
    """Whether there was anything to do; raises `refusal` where there is, and it cannot be done."""
    # Ray alone takes seconds, and the lines about the input should not wait for it.
    from datapipe.run import plan_of, run
    from datapipe.shards import Store

    if refusal is None:
        return run(settings, rows, out, ray_address, append=append)
    store = Store(out)
    if plan_of(settings, rows, store, append=append).missing(store, "shard"):
        raise refusal
    return False


def _report_run(store: Store, out: str, worked: bool, web: ToyWeb | None) -> None:
    """Prints what is now in the dataset, and adds what only a finished run can: identities and a contact sheet."""
    from datapipe.inspect import summarize
    from datapipe.schema import IDENTITIES
    from toyworld.identities import write_identities
    from toyworld.score import score_against_truth

    console = Console()
    if not worked:
        console.print(f"{out} is complete: nothing to do", highlight=False, soft_wrap=True)
    summary = summarize(store)
    console.print(summary.funnel())
    if web is not None:
        console.print(score_against_truth(store, web.truth))
        if worked or not store.exists(IDENTITIES):
            write_identities(store, web)
    if worked:
        _save_contact_sheet(store, summary)
    console.print(f"shards: {out}", highlight=False, soft_wrap=True)
    if store.exists(CONTACT_SHEET):
        console.print(f"contact sheet: {out}/{CONTACT_SHEET}", highlight=False, soft_wrap=True)


def _save_contact_sheet(store: Store, summary: Summary) -> None:
    """Draws the first kept images, so that the first look needs no further command."""
    from datapipe.inspect import contact_sheet
    from datapipe.shards import kept_samples

    samples = list(itertools.islice(kept_samples(store), CONTACT_SHEET_IMAGES))
    if samples:
        sink = io.BytesIO()
        kept, entities = summary.entities_per_image.total(), summary.tags.total()
        counts = f"{summary.rows:,} rows, {kept:,} kept with {entities:,} entities; the first {len(samples)}"
        contact_sheet(samples, store.root.rpartition("/")[2], counts).save(sink, "PNG")
        store.put(CONTACT_SHEET, sink.getvalue())


@app.command()
def recipe(
    word: Annotated[
        str | None,
        typer.Argument(help="A bundled recipe, to print it; or a word, for the keys that it is in."),
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print it as Markdown, as in manifests/recipes/README.md.")] = False,
) -> None:
    """Lists the keys of recipes, or prints a recipe.

    Each key with its type, default and meaning. A recipe of your own begins with `sdd recipe toy > my.yaml`.
    """
    if word in recipe_names():
        print(recipe_path(word).read_text("utf-8"), end="")
        return
    from datapipe.pairs.settings import PairSettings
    from toyworld.recipe import ToyRecipe
    from train.trainer.recipe import TrainRecipe

    kinds: dict[str, type[Settings]] = {
        "Datasets (`sdd dataset`)": ToyRecipe,
        "Pairs (`sdd pairs`)": PairSettings,
        "Training (`sdd train`)": TrainRecipe,
    }
    found = {title: [row for row in describe(kind) if not word or word in row[0]] for title, kind in kinds.items()}
    if not any(found.values()):
        raise RecipeError(f"{word}: no recipe key holds it, nor is it a recipe; `sdd recipe` lists all keys")
    if markdown:
        print("# Recipe keys\n\nWritten by `sdd recipe --markdown`.")
    for title, rows in found.items():
        if rows:
            (_print_markdown if markdown else _print_keys)(title, rows)


def _print_markdown(title: str, rows: Sequence[Described]) -> None:
    print(f"\n## {title}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")


def _print_keys(title: str, rows: Sequence[Described]) -> None:
    """A key, its type and its default on a line, never cut: they are there to be copied. The meaning below."""
    console = Console(highlight=False)
    console.print(Text(title, "bold"))
    for key, kind, default, meaning in rows:
        console.print(Text.assemble((key, "cyan"), f"  {kind}, {default}"), soft_wrap=True)
        console.print(Padding(Text(meaning), (0, 0, 0, 4)))
    console.print()


for command in (
    planning.doctor,
    planning.plan,
    inspection.status,
    inspection.inspect,
    inspection.report,
    inspection.card,
    inspection.diff,
    inspection.audit,
    inspection.verify,
    conversion.export,
    conversion.import_labels,
    conversion.reselect,
    pairing.pairs,
    training.cache,
    training.train,
    sampling.sample,
    demo.demo,
    evaluation.evaluate,
    evaluation.compare,
    training.ablate,
    training.sweep,
):
    app.command("import" if command is conversion.import_labels else None)(command)  # a name that Python keeps
