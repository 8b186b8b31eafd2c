"""What a run over a whole input will take, judged from a run over some of its rows: rows, hours, bytes and money."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from datapipe import placing
from datapipe.backends.loading import ModelSettings
from datapipe.gpu_rates import PUBLISHED
from datapipe.inspect.audit import wilson_interval
from datapipe.ledger import Tally
from datapipe.progress import THROUGHPUT_FILE
from datapipe.recipe import Pool, Recipe
from datapipe.schema import Outcome, StageName
from datapipe.shards import Store, iter_tables, manifests, read_slice
from datapipe.sources import InputRows
from datapipe.stages import FETCH_STAGES
from subject_diffusion.errors import RunError

HOUR_S = 3600.0


@dataclass(frozen=True)
class Interval:
    """What is expected, and the ends of its 95 % interval."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.expected * factor, self.high * factor)

    def plus(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.expected + other.expected, self.high + other.high)

    @staticmethod
    def exactly(value: float) -> Interval:
        return Interval(value, value, value)


@dataclass(frozen=True)
class Machines:
    """`nodes`: (CPU cores, GPUs) of each; `price`: of each per hour; default: not known."""

    nodes: tuple[tuple[float, float], ...]
    price: float | None = None

    @property
    def have_gpus(self) -> bool:
        return any(gpus for _, gpus in self.nodes)


@dataclass(frozen=True)
class Rate:
    """`row_s`: seconds of an actor per row; `source`: who measured it, and where."""

    row_s: float
    source: str


@dataclass(frozen=True)
class Sampled:
    """What a run over some rows found. `tallies`: by stage; `image_bytes`: mean size of the images that were downloaded
    and passed the first phase, 0 where none was; `raw_bytes`, `tar_bytes`, `sidecar_bytes`: of all raw shards, and of
    the shards' two kinds of files; `on_gpu`: whether the models had GPUs."""

    rows: int
    tallies: Mapping[StageName, Tally]
    kept: int
    image_bytes: float
    raw_bytes: int
    tar_bytes: int
    sidecar_bytes: int
    on_gpu: bool


@dataclass(frozen=True)
class StageForecast:
    """`rows`: that come to the stage; `rate`: None where nobody has measured it; hours: of all its actors together."""

    stage: StageName
    rows: Interval
    rate: Rate | None
    cpu_hours: Interval | None
    gpu_hours: Interval | None


@dataclass(frozen=True)
class Forecast:
    """A whole run. `workers`: by pool, of sizes that balance the pools on these machines; `hours`: from start to end,
    None as those of annotating where a stage's rate is not known; `price`: of all machines for all hours, None where
    one is not known."""

    rows: int
    sampled: int
    stages: tuple[StageForecast, ...]
    kept: Interval
    machines: Machines
    workers: Mapping[str, int]
    fetch_hours: Interval
    annotate_hours: Interval | None
    hours: Interval | None
    download_bytes: Interval
    raw_bytes: float
    shard_bytes: Interval
    price: Interval | None


def sampled_rows(rows: InputRows, count: int, scratch: str) -> InputRows:
    """`count` rows chosen at random, always the same, in their order."""
    chosen = sorted(random.Random(0).sample(range(rows.rows), min(count, rows.rows)))
    return rows.only(chosen, scratch)


def check_machines(recipe: Recipe, machines: Machines) -> None:
    """Raises RunError when a run of the recipe finds no room on these machines."""
    largest = max(cpus for cpus, _ in machines.nodes)
    if largest < recipe.run.fetch_cpus:
        raise RunError(
            f"run.fetch_cpus asks for {recipe.run.fetch_cpus:g} CPU on one machine, and they have {largest:g}"
        )
    pools = _pools(recipe, machines)
    placing.balanced(pools, [0.0] * len(pools), machines.nodes, most=1)


def read_sample(store: Store, recipe: Recipe) -> tuple[Sampled, list[tuple[float, float]]]:
    """What the run into this folder did, and the (CPUs, GPUs) of each machine that it ended on. Raises RunError where
    it was stopped before it noted how long a stage took."""
    timed, nodes = _timed(store)
    counted = _counts(store, recipe)
    if untimed := [stage.value for stage, seen in counted.items() if seen.rows and not timed[stage].rows]:
        raise RunError(
            f"{store.root}: the sample was stopped before it was noted how long {', '.join(untimed)} took; name "
            "another --out, or remove this folder, and the sample is done again"
        )
    tallies = {stage: _as_long_a_row(seen, timed[stage]) for stage, seen in counted.items()}
    shards, raw = list(manifests(store, "shard")), list(manifests(store, "raw"))
    fetched = itertools.chain.from_iterable(read_slice(store, manifest).samples for manifest in raw)
    sizes = [len(s.image) for s in fetched if s.image is not None and s.http_status is not None]
    sampled = Sampled(
        rows=sum(m.rows for m in shards),
        tallies=tallies,
        kept=sum(m.counts.get(Outcome.KEPT.value, 0) for m in shards),
        image_bytes=fmean(sizes) if sizes else 0.0,
        raw_bytes=sum(m.tar.size + m.parquet.size for m in raw),
        tar_bytes=sum(m.tar.size for m in shards),
        sidecar_bytes=sum(m.parquet.size for m in shards),
        on_gpu=any(gpus for _, gpus in nodes),
    )
    return sampled, nodes


def _timed(store: Store) -> tuple[Mapping[StageName, Tally], list[tuple[float, float]]]:
    """What all runs into the folder took together, and the machines of the last. Raises RunError."""
    timed: defaultdict[StageName, Tally] = defaultdict(Tally)
    nodes: list[tuple[float, float]] = []
    try:
        for line in store.read(THROUGHPUT_FILE).splitlines() if store.exists(THROUGHPUT_FILE) else ():
            phase = json.loads(line)
            for name, told in phase["stages"].items():
                timed[StageName(name)] += Tally(**told)
            nodes = [(float(cpus), float(gpus)) for cpus, gpus in phase["nodes"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"{store.root}/{THROUGHPUT_FILE}: not what this release records; name another --out for the sample"
        ) from None
    if not nodes:
        raise RunError(f"{store.root}: no run has ended here; name another --out, and the sample is done again")
    return timed, nodes


def _counts(store: Store, recipe: Recipe) -> dict[StageName, Tally]:
    """Rows that came to each stage, and were dropped or failed there, as the shards have it: what was timed may be only
    what the last of several runs did."""
    lost: Counter[tuple[str, str]] = Counter()
    for table in iter_tables(store, "shard", ["stage", "outcome"]):
        lost.update(zip(table["stage"].to_pylist(), table["outcome"].to_pylist(), strict=True))
    come = lost.total()
    found: dict[StageName, Tally] = {}
    for stage in recipe.stages():
        dropped, failed = (lost[stage.value, outcome.value] for outcome in (Outcome.DROPPED, Outcome.FAILED))
        found[stage] = Tally(come, dropped, failed)
        come -= dropped + failed
    return found


def _as_long_a_row(seen: Tally, timed: Tally) -> Tally:
    """The counts of `seen`, with what `timed` took for each of its rows."""
    if not timed.rows:
        return seen
    times = seen.rows / timed.rows
    return replace(
        seen,
        busy_s=timed.busy_s * times,
        tail_s=timed.tail_s * times,
        batches=max(1, round(timed.batches * times)),
    )


def forecast(
    recipe: Recipe, sampled: Sampled, rows: int, machines: Machines, rates: Mapping[StageName, float]
) -> Forecast:
    """A run over `rows` rows like those of the sample. `rates`: images/s of a stage on one GPU, which go before those
    of the sample and the published ones. Raises RunError when a pool fits none of the machines."""
    check_machines(recipe, machines)
    pools = _pools(recipe, machines)
    fetching = Pool(stages=FETCH_STAGES, cpus=recipe.run.fetch_cpus)
    by_pool = [
        [_stage(recipe, stage, pool, asked, sampled, rows, rates) for stage in recipe.with_optional(pool.stages)]
        for pool, asked in zip((fetching, *pools), (fetching, *recipe.run.pools), strict=True)
    ]
    fetch_s, *annotate_s = map(_actor_s, by_pool)
    slices = math.ceil(rows / recipe.slice_rows)
    workers = placing.balanced(pools, annotate_s, machines.nodes, most=slices)
    fetchers = recipe.run.fetch_workers or sum(int(cpus / fetching.cpus) for cpus, _ in machines.nodes)
    fetchers = min(fetchers, slices)
    stages = list(itertools.chain.from_iterable(by_pool))
    fetching_h = _spread(by_pool[0], fetch_s / fetchers / HOUR_S)
    annotating_h = None
    if all(s.rate for s in stages):
        longest_s = max(seconds / n for seconds, n in zip(annotate_s, workers, strict=True))
        annotating_h = _spread(stages[len(by_pool[0]) :], longest_s / HOUR_S)
    hours = annotating_h and fetching_h.plus(annotating_h)
    kept, every = _share(sampled.kept, sampled.rows).times(rows), rows / sampled.rows
    downloads = next(s.rows for s in stages if s.stage is StageName.SCREEN)
    tars = kept.times(sampled.tar_bytes / max(sampled.kept, 1))
    return Forecast(
        rows=rows,
        sampled=sampled.rows,
        stages=tuple(stages),
        kept=kept,
        machines=machines,
        workers={pool.name: size for pool, size in zip((fetching, *pools), (fetchers, *workers), strict=True)},
        fetch_hours=fetching_h,
        annotate_hours=annotating_h,
        hours=hours,
        download_bytes=downloads.times(sampled.image_bytes),
        raw_bytes=sampled.raw_bytes * every,
        shard_bytes=tars.plus(Interval.exactly(sampled.sidecar_bytes * every)),
        price=hours.times(machines.price * len(machines.nodes)) if hours and machines.price is not None else None,
    )


def _pools(recipe: Recipe, machines: Machines) -> list[Pool]:
    """Those of the recipe, which on machines without GPUs ask for none."""
    return [pool if machines.have_gpus else pool.model_copy(update={"gpus": 0.0}) for pool in recipe.run.pools]


def _stage(
    recipe: Recipe,
    stage: StageName,
    pool: Pool,
    asked: Pool,
    sampled: Sampled,
    rows: int,
    rates: Mapping[StageName, float],
) -> StageForecast:
    """`asked`: the pool as the recipe has it, before GPUs that are not there were left out."""
    tally = sampled.tallies.get(stage, Tally())
    come = _share(tally.rows, sampled.rows).times(rows) if tally.rows < sampled.rows else Interval.exactly(rows)
    block = recipe.stages()[stage]
    has_model = isinstance(block, ModelSettings) and block.computes_here and asked.gpus > 0
    if has_model and pool.gpus:
        rate = _rate_on_gpu(recipe, stage, pool, tally, sampled.on_gpu, rates)
    elif has_model and sampled.on_gpu:
        rate = None  # it ran on a GPU, and is to run on a CPU
    else:
        rate = _measured(tally, recipe)
    hours = come.times(rate.row_s / HOUR_S) if rate else None
    return StageForecast(
        stage, come, rate, hours and hours.times(pool.cpus), hours and hours.times(pool.gpus) if pool.gpus else None
    )


def _rate_on_gpu(
    recipe: Recipe, stage: StageName, pool: Pool, tally: Tally, on_gpu: bool, rates: Mapping[StageName, float]
) -> Rate | None:
    per_gpu = 1 / min(pool.gpus, 1.0)
    """Actors that share a GPU."""
    if stage in rates:
        return Rate(per_gpu / rates[stage], "as you say")
    if on_gpu:
        return _measured(tally, recipe)
    block = recipe.stages()[stage]
    published = PUBLISHED.get(block.model) if isinstance(block, ModelSettings) else None
    return Rate(per_gpu / published.images_per_s, f"{published.gpu}: {published.source}") if published else None


def _measured(tally: Tally, recipe: Recipe) -> Rate | None:
    """Each row takes its part, in a whole batch, of the wait for the last rows, however few rows there were."""
    if not tally.rows:
        return None
    most = min(recipe.slice_rows, recipe.fetch.micro_batch)
    waited_s = tally.tail_s * tally.rows / (max(tally.batches, 1) * most)
    return Rate((tally.busy_s - tally.tail_s + min(waited_s, tally.tail_s)) / tally.rows, "this sample")


def _actor_s(stages: Sequence[StageForecast]) -> float:
    """Seconds that the stages of a pool take of its actors, as far as their rates are known."""
    return sum(s.rows.expected * s.rate.row_s for s in stages if s.rate)


def _share(some: int, of: int) -> Interval:
    return Interval(wilson_interval(some, of)[0], some / of, wilson_interval(some, of)[1])


def _spread(stages: Sequence[StageForecast], expected: float) -> Interval:
    """`expected` with as wide an interval as that of the work in all stages together."""
    low, middle, high = (
        sum(getattr(s.rows, end) * s.rate.row_s for s in stages if s.rate) for end in ("low", "expected", "high")
    )
    return Interval(expected * low / middle, expected, expected * high / middle) if middle else Interval(0, 0, 0)
