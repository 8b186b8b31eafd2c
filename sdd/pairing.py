"""`sdd pairs`: arguments in, one call, what it said out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sdd.console import DatasetFolder, say

if TYPE_CHECKING:
    from datapipe.pairs.settings import PairSettings
    from datapipe.pairs.write import Found
    from datapipe.shards import Store

TOY_ENCODER_ALONE = (
    "the toy encoder knows the drawn subjects of the toy world, and the default thresholds fit it alone; what they "
    "make of other pictures means nothing (--set embed.model=facebook/dinov2-base; docs/pairs.md tells more)"
)


def pairs(
    path: DatasetFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override a setting: embed.model=facebook/dinov2-base, decide.min_margin=0.5, …; it is kept."
        ),
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Keep out images that look like any in DIR, such as a benchmark's; later calls do, too."
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: auto or host:port. [default: Ray on this machine]", envvar="RAY_ADDRESS"),
    ] = None,
) -> None:
    """Finds the same subject in different images, to train on.

    Writes PATH/identities.parquet, which training reads, and PATH/pairs.parquet with the scores of every candidate.
    When killed and run again, it continues; with other `decide.*` settings, it needs no model.
    """
    from datapipe.inspect.pair_agreement import agreement
    from datapipe.pairs.run import find_pairs
    from datapipe.pairs.settings import settings_of
    from datapipe.shards import Store

    store = Store(path, create=False)
    settings = settings_of(store, overrides or [])
    console = Console()
    if _is_foreign(store, settings):
        console.print(TOY_ENCODER_ALONE, style="yellow", highlight=False, soft_wrap=True)
    found = find_pairs(store, settings, ray_address, exclude)
    console.print(_table(found))
    given = agreement(store)
    if given is not None:
        say(str(given))
    images = ", ".join(f"{many:,} in {size}" for size, many in found.images.items())
    say(f"{path}/identities.parquet: {found.identities:,} identities{f' ({images} images)' if images else ''}")


def _is_foreign(store: Store, settings: PairSettings) -> bool:
    """Whether the toy world's encoder is to look at images that are not of the toy world."""
    from datapipe.pairs.settings import EmbedSettings
    from datapipe.plan import read_run
    from datapipe.shards import RUN_FILE

    is_toy_encoder = settings.embed.model == EmbedSettings().model
    return is_toy_encoder and store.exists(RUN_FILE) and read_run(store).recipe.toyworld is None


def _table(found: Found) -> Table:
    from datapipe.pairs.decide import REJECTIONS

    title = f"{found.entities:,} entities, {sum(found.rejected.values()):,} candidates"
    table = Table("candidates", "number", box=None, title=title, title_justify="left")
    for rejection in REJECTIONS:
        if many := found.rejected.get(rejection, 0):
            table.add_row("pairs" if rejection is None else rejection.value, f"{many:,}")
    return table
