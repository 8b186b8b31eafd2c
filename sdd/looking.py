"""The commands that look into datasets and make new ones of them: arguments in, one call, what it said out."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from datapipe.errors import ShardError
from datapipe.schema import clean_text

Folder = Annotated[str, typer.Argument(metavar="PATH", help="A dataset folder: local, s3:// or gs://.")]


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


def _say(text: str) -> None:
    """A line that may hold text of the web, which is not let near the terminal's control codes."""
    Console().print(clean_text(text), highlight=False, markup=False, soft_wrap=True)
