"""The commands that look into a dataset: arguments in, one call, what it said out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sdd.console import DatasetFolder, say
from subject_diffusion.errors import ShardError

if TYPE_CHECKING:
    from datapipe.shards import Store


def status(
    path: DatasetFolder, as_json: Annotated[bool, typer.Option("--json", help="For scripts: one JSON object.")] = False
) -> None:
    """Says how far a run is, from any shell.

    What is done and left, how fast, the slowest stage, why rows fail, and the workers. Without a run, what is there.
    """
    from datapipe.inspect.state import state_of
    from datapipe.shards import Store

    state = state_of(Store(path, create=False))
    if as_json:
        print(json.dumps(state.to_json()))
    else:
        Console(highlight=False).print(state)


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
            help="List candidate boxes instead of rows: tag, score, text_score, area, aspect, box, mask, and the "
            "reason why a box is no entity: \"reason = 'area'\".",
        ),
    ] = False,
    entity: Annotated[
        str | None, typer.Option(metavar="TAG", help="Only images that show it; draw only that entity.")
    ] = None,
    sample: Annotated[
        str | None, typer.Option(metavar="KEY", help="Only this sample: its details and picture.")
    ] = None,
    random: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="N at random, of those that match or were kept.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For --random: the same seed makes the same choice.")] = 0,
    save: Annotated[
        Path | None,
        typer.Option(help="Draw into this PNG: one sample, or a sheet of the first 64."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: one JSON object per line.")] = False,
) -> None:
    """Shows what is in a dataset: tables, rows, samples, pictures.

    Pictures are shown in the terminal where it can show any, and saved with --save.
    """
    from datapipe.inspect import Query
    from datapipe.inspect import inspect as show

    query = Query(shard, where, candidates, entity, sample, random, seed, save, as_json)
    show(path, query, Console())


def report(
    path: DatasetFolder,
    save: Annotated[Path | None, typer.Option(help="Where the page goes. [default: PATH/report.html]")] = None,
    seed: Annotated[int, typer.Option(help="The same seed shows the same images.")] = 0,
) -> None:
    """Writes an HTML page to look through offline.

    It holds the funnel, distributions, galleries of images that were kept, that were lost, and that lie at the edges,
    and a list of rows to search, filter and sort.
    """
    from datapipe.inspect.report import REPORT_FILE, report_page
    from datapipe.shards import Store

    store = Store(path, create=False)
    _put(store, REPORT_FILE, report_page(store, seed), save)


def card(
    path: DatasetFolder,
    save: Annotated[Path | None, typer.Option(help="Where the card goes. [default: PATH/README.md]")] = None,
) -> None:
    """Writes the dataset card of the Hugging Face hub.

    It holds numbers, recipe, models, licenses, opt-outs and known limits.
    """
    from datapipe.inspect.dataset_card import CARD_FILE, dataset_card
    from datapipe.shards import Store

    store = Store(path, create=False)
    _put(store, CARD_FILE, dataset_card(store), save)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A dataset folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, made from the same input.")],
    save: Annotated[Path | None, typer.Option(help="Write a page with pictures here (HTML).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed shows the same images.")] = 0,
) -> None:
    """Says what two runs kept, labeled otherwise, and lost."""
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


def audit(
    path: DatasetFolder,
    images: Annotated[int, typer.Option("-n", "--images", min=1, help="Images to ask about.")] = 200,
    seed: Annotated[int, typer.Option(help="Another seed draws other images.")] = 0,
    port: Annotated[
        int, typer.Option(show_default=False, help="Port of the page, on this machine. [default: a free one]")
    ] = 0,
    results: Annotated[bool, typer.Option("--results", help="Only print the precision so far.")] = False,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Ask about -n candidates of `sdd pairs`: are both the same subject?")
    ] = False,
) -> None:
    """Asks a person what is right; says each stage's precision.

    The questions are asked in a browser and answered by the arrow keys; skipping takes an answer back. The marks are
    kept in PATH/audit.json, those of pairs in PATH/audit-pairs.json.
    """
    import webbrowser

    from datapipe.inspect.audit import Questioning, precision_table
    from datapipe.inspect.audit_server import served
    from datapipe.inspect.pair_audit import PairQuestioning, pair_precision_table
    from datapipe.shards import Store

    store = Store(path, create=False)
    questioning = PairQuestioning(store, images, seed) if pairs else Questioning(store, images, seed)
    if not results:
        say(f"{questioning.described}; begin with fewer by -n")
        with served(questioning.page, questioning.receive, port) as (address, done):
            say(f"{address}  (Ctrl-C ends here, or `done` there; the same command resumes)")
            webbrowser.open(address)
            with contextlib.suppress(KeyboardInterrupt):
                done.wait()
    table = pair_precision_table if pairs else precision_table
    Console().print(table(questioning.audit, len(questioning.asked)))


def verify(
    path: DatasetFolder,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="First remove the temporary files of killed writers, and write lost manifests of whole shards again.",
        ),
    ] = False,
) -> None:
    """Checks a dataset against its manifests.

    Every hash, count, span, box and mask is checked. Exit code 0: all is well; 1: it is not.
    """
    from datapipe.shards import Store, present, rebuild_manifests
    from datapipe.shards import verify as problems_of

    store = Store(path, create=False)
    if not present(store, "shard") and not present(store, "raw"):
        raise ShardError(f"{path}: no shards here; `sdd dataset --out {path}` makes them")
    if repair:
        with store.lock():
            for name in store.clear_temporaries():
                say(f"removed {name}")
            for name in rebuild_manifests(store):
                say(f"written again: {name}")
    found = 0
    for problem in problems_of(store):
        found += 1
        say(f"{problem.file}: {problem.what}")
    say(f"{path}: {len(present(store, 'shard'))} shards, {f'{found} problems' if found else 'all well'}")
    raise typer.Exit(1 if found else 0)


def _put(store: Store, name: str, text: str, save: Path | None) -> None:
    """Into the dataset folder, or where the user wants it."""
    from subject_diffusion.errors import RunError
    from subject_diffusion.storage import named_errors

    data = text.encode()
    if save is None:
        store.put(name, data)
    else:
        with named_errors(str(save), RunError):
            save.write_bytes(data)
    say(f"{save or f'{store.root}/{name}'}: {len(data) / 1e6:.2f} MB")
