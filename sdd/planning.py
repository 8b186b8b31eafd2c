"""Commands for before a run: what could stop it, and what it will take."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sdd.console import say
from subject_diffusion.errors import RecipeError

if TYPE_CHECKING:
    from datapipe.forecast import Forecast, Interval, Machines
    from datapipe.schema import StageName
    from toyworld.recipe import ToyRecipe

RecipeArgument = Annotated[Path, typer.Argument(help="A YAML file, or a bundled recipe: toy, sdd, modern or sam3.")]
InputOption = Annotated[str | None, typer.Option("--input", help="As for `sdd dataset`.")]
OverridesOption = Annotated[list[str] | None, typer.Option("--set", help="As for `sdd dataset`.")]
AddressOption = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto or host:port. [default: Ray on this machine]", envvar="RAY_ADDRESS"),
]


def doctor(
    recipe: RecipeArgument,
    source: InputOption = None,
    out: Annotated[str | None, typer.Option("--out", help="As for `sdd dataset`. [default: out/RECIPE]")] = None,
    ray_address: AddressOption = None,
    overrides: OverridesOption = None,
) -> None:
    """Looks for what could stop a run, before any work.

    One line per check, from versions to each model's answer on an image: ok, warn or FAIL, and what to do. Exit code 2
    when any fails.
    """
    from datapipe.doctor import diagnose
    from subject_diffusion.settings import load_settings
    from toyworld.recipe import ToyRecipe

    settings = load_settings(ToyRecipe, recipe, overrides or [])
    failed = False
    for check in diagnose(settings, source, out or f"out/{recipe.stem}", ray_address):
        say(str(check))
        failed |= check.level == "FAIL"
    raise typer.Exit(2 if failed else 0)


def plan(
    recipe: RecipeArgument,
    source: InputOption = None,
    sample: Annotated[int, typer.Option(min=1, help="Rows that are done to judge the others by.")] = 200,
    for_rows: Annotated[
        int | None, typer.Option("--for", min=1, help="Rows to plan for. [default: those of the input]")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines to plan for. [default: those that Ray has]")
    ] = None,
    cpus: Annotated[float | None, typer.Option(min=0, help="CPU cores of each. [default: as the largest here]")] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of each. [default: as the largest here]")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one machine per hour, in any currency.")] = None,
    rate: Annotated[
        list[str] | None, typer.Option(help="Images/s of a stage on one of these GPUs: ground=20. May be repeated.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder for the sample, seen by all nodes. [default: a temporary one]")
    ] = None,
    ray_address: AddressOption = None,
    overrides: OverridesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Says what a run will take: rows, hours, machines, bytes and money.

    Runs the recipe over some rows, chosen at random, and extrapolates. Near duplicates are found only among all rows,
    so that a whole run keeps fewer. To choose at random, a Hugging Face dataset is read whole; with --for, its first
    rows are taken.
    """
    from subject_diffusion.settings import load_settings
    from toyworld.recipe import ToyRecipe

    if ray_address and out is None:
        raise RecipeError("--ray-address needs --out, a folder for the sample that every node sees")
    settings = load_settings(ToyRecipe, recipe, overrides or [])
    rates = _rates(rate or [], settings)
    wanted = _wanted(nodes, cpus, gpus, price)
    with contextlib.ExitStack() as resources:
        folder = out or resources.enter_context(tempfile.TemporaryDirectory())
        # What the run over the sample says is not the result.
        with contextlib.redirect_stdout(sys.stderr):
            found = _forecast(settings, source, sample, for_rows, wanted, rates, folder, ray_address)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        _print_forecast(found)


def _forecast(
    settings: ToyRecipe,
    source: str | None,
    sample: int,
    for_rows: int | None,
    wanted: _Wanted,
    rates: dict[StageName, float],
    folder: str,
    address: str | None,
) -> Forecast:
    from datapipe.forecast import check_machines, forecast, read_sample, sampled_rows
    from datapipe.plan import Part, parts_of
    from datapipe.run import run
    from datapipe.shards import Store
    from datapipe.sources import open_source
    from toyworld.server import served

    if wanted.cpus is not None:
        check_machines(settings, wanted.machines([(wanted.cpus, wanted.gpus or 0.0)]))
    store = Store(folder)
    with contextlib.ExitStack() as resources:
        if source is None and settings.toyworld is not None:
            source = str(resources.enter_context(served(settings.toyworld, Path("out"))).table)
        reading = settings.source.model_copy(update={"path": source or settings.source.path})
        scratch = resources.enter_context(tempfile.TemporaryDirectory())
        rows = open_source(reading, scratch, glance=sample if for_rows else None)
        chosen = sampled_rows(rows, sample, scratch)
        if parts_of(store) not in ((), (Part(chosen.rows, chosen.fingerprint),)):
            raise RecipeError(f"--out {folder}: holds a dataset; name a folder for the sample alone")
        for line in rows.described():
            say(line)
        if not run(settings, sampled_rows(rows, sample, folder), folder, address):
            say(f"{folder}: this sample is there already")
        sampled, there = read_sample(store, settings)
    return forecast(settings, sampled, for_rows or rows.rows, wanted.machines(there), rates)


def _rates(words: list[str], settings: ToyRecipe) -> dict[StageName, float]:
    from datapipe.backends.loading import ModelSettings
    from datapipe.schema import StageName

    blocks = settings.stages()
    on_gpu = [
        stage
        for pool in settings.run.pools
        if pool.gpus
        for stage in settings.with_optional(pool.stages)
        if isinstance(block := blocks[stage], ModelSettings) and block.computes_here
    ]
    found: dict[StageName, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            stage = StageName(name)
            found[stage] = float(value)
        except ValueError:
            raise RecipeError(f"--rate {word}: not a stage and its images/s, such as ground=20") from None
        if not (0 < found[stage] < math.inf):
            raise RecipeError(f"--rate {word}: a rate is a number above 0")
        if stage not in on_gpu:
            those = ", ".join(one.value for one in on_gpu) or "none"
            raise RecipeError(f"--rate {word}: of this recipe's stages, these have a model on a GPU: {those}")
    return found


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The machines that were asked for; None: as they are here."""

    nodes: int | None
    cpus: float | None
    gpus: float | None
    price: float | None

    def machines(self, there: list[tuple[float, float]]) -> Machines:
        """`there`: (CPUs, GPUs) of each machine that Ray has."""
        from datapipe.forecast import Machines

        if self.nodes is None and self.cpus is None and self.gpus is None:
            return Machines(tuple(there), self.price)
        most_cpus, most_gpus = (max(each) for each in zip(*there, strict=True))
        one = (most_cpus if self.cpus is None else self.cpus, most_gpus if self.gpus is None else self.gpus)
        return Machines((one,) * (self.nodes or len(there)), self.price)


def _wanted(nodes: int | None, cpus: float | None, gpus: float | None, price: float | None) -> _Wanted:
    for name, value in (("--cpus", cpus), ("--gpus", gpus), ("--price", price)):
        if value is not None and not math.isfinite(value):
            raise RecipeError(f"{name} {value}: not a number of anything")
    if gpus is not None and gpus != int(gpus):
        raise RecipeError(f"--gpus {gpus:g}: a machine has whole ones")
    return _Wanted(nodes, cpus, gpus, price)


def _print_forecast(found: Forecast) -> None:
    table = Table("stage", "rows", "95 %", "rows/s", "CPU h", "GPU h", "rows/s of a worker: from", box=None)
    for one in found.stages:
        hours = [_number(each.expected) if each else "?" for each in (one.cpu_hours, one.gpu_hours)]
        per_s = _number(1 / one.rate.row_s) if one.rate and one.rate.row_s else ""
        by = one.rate.source if one.rate else f"nobody: --rate {one.stage.value}=IMAGES_PER_S"
        gpu = "" if one.gpu_hours is None and one.rate else hours[1]
        table.add_row(one.stage.value, _number(one.rows.expected), _range(one.rows), per_s, hours[0], gpu, by)
    Console().print(table)
    for line in _lines(found):
        say(line)


def _lines(found: Forecast) -> Iterator[str]:
    kept = f"{_number(found.kept.expected)} kept ({_range(found.kept)})"
    yield f"{found.rows:,} rows, judged by {found.sampled:,}: {kept}, less the near duplicates among them"
    cpus, gpus = (sum(each) for each in zip(*found.machines.nodes, strict=True))
    machines = len(found.machines.nodes)
    where = f"{machines} machine{'s' * (machines > 1)} with {cpus:g} CPU and {gpus:g} GPU in all"
    yield f"on {where}: {', '.join(f'{name} {size:,}' for name, size in found.workers.items())} workers"
    if found.hours is None:
        yield "time: not known, because a stage's rate is not"
    else:
        fetch, annotate = (_time(part.expected) for part in (found.fetch_hours, found.annotate_hours or found.hours))
        low, expected, high = map(_time, (found.hours.low, found.hours.expected, found.hours.high))
        yield f"time: {expected} ({low} to {high}), {fetch} to fetch, then {annotate} to annotate, and the start"
    if found.price is not None:
        yield f"price: {_number(found.price.expected)} ({_range(found.price)})"
    yield f"download: at least {_size(found.download_bytes.expected)}; more where images are shrunk or dropped"
    yield f"storage: {_size(found.shard_bytes.expected)}, and until the end {_size(found.raw_bytes)} of raw shards"


def _range(interval: Interval) -> str:
    return f"{_number(interval.low)} to {_number(interval.high)}"


def _time(hours: float) -> str:
    unit, name = next(((u, n) for u, n in ((1.0, "hours"), (60.0, "minutes")) if hours * u >= 1), (3600.0, "seconds"))
    return f"{_number(hours * unit)} {name}"


def _number(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:,.1f} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(bytes_: float) -> str:
    return next(
        (f"{bytes_ / unit:,.1f} {name}" for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if bytes_ >= unit),
        f"{bytes_ / 1e3:,.1f} kB",
    )
