"""A whole run: recipe -> plan -> Ray Data -> committed shards. It has two phases, each of which can be resumed; they
overlap where no duplicates are sought."""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.data import Dataset
from ray.exceptions import OutOfMemoryError, RayError

from datapipe import cluster, placing, progress, status
from datapipe.deduplicate import DuplicatesBySlice, find_all_duplicates
from datapipe.duplicates_on_ray import paired_on_ray
from datapipe.growing import with_input, with_retry
from datapipe.ledger import Hopeless, Ledger
from datapipe.metrics import Metrics
from datapipe.plan import (
    Plan,
    check_folder,
    check_sources,
    claim_folder,
    found_words,
    make_plan,
    read_found,
    record_found,
)
from datapipe.probe import Answer, ask
from datapipe.recipe import Found, Pool, Recipe, RunSettings, check_stages
from datapipe.schema import Reason, StageName
from datapipe.shards import Kind, Store, manifest_name, read_manifest
from datapipe.shards.read_ahead import read_ahead
from datapipe.sources import InputRows
from datapipe.stages import ANNOTATE_STAGES, FETCH_STAGES
from datapipe.watch import head_watched, standstill_watched
from datapipe.workers import AnnotateWorker, FetchWorker, batches_at_once, use_one_thread
from subject_diffusion.errors import RunError, SddError, one_line

WAVE = 5000
"""Slices that Ray Data gets at once. It bounds what the driver holds, however long the input is."""
_STAGES: Mapping[Kind, Sequence[StageName]] = {"raw": FETCH_STAGES, "shard": ANNOTATE_STAGES}
_FETCH_POOL = "+".join(stage.value for stage in FETCH_STAGES)
LOOK_S = 2.0
"""How long the display waits for the ledger."""


def run(
    recipe: Recipe,
    source: InputRows | None,
    out: str,
    address: str | None = None,
    *,
    append: bool = False,
    retry: Sequence[Reason] = (),
) -> bool:
    """Makes every missing shard of `out`; returns whether there was anything to do.

    `source`: the input; with `retry` it is None, and the rows of `out` that failed for these reasons, and could go well
    now, are done again. `append`: whether the input's rows may be added to those of others. `address`: a Ray cluster's;
    default: Ray starts in this process. Raises SddError, where possible before any work.
    """
    store = Store(out)
    with store.lock(), _leaving_nothing(store):
        plan = plan_of(recipe, source, store, append=append, retry=retry)
        missing = plan.missing(store, "shard")
        if not missing:
            return False
        check_sources(plan, plan.to_fetch(store))
        check_stages(plan.recipe)
        status.begin(store, "starting Ray")
        with cluster.connected(address), head_watched(), _rays_errors_in_one_line():
            settings = cluster.find_room(plan.recipe.run, len(missing), address)
            plan = plan.with_found(_found_before(store, settings))
            status.begin(store, "loading models")
            costs, found = ask_models(plan, settings, missing)
            plan = plan.with_found(found)
            claim_folder(plan, store)
            record_found(store, found)
            if plan.recipe.screen.seeks_duplicates:
                fetch(plan, store, costs)
                status.begin(store, "looking for duplicates")
                find_all_duplicates(store, plan.recipe.screen, plan.parts, paired_on_ray)
            else:
                find_all_duplicates(store, plan.recipe.screen, plan.parts)
                fetch_and_annotate(plan, settings, store, costs)
            annotate(plan, settings, store, costs)
    return True


def plan_of(
    recipe: Recipe, source: InputRows | None, store: Store, *, append: bool, retry: Sequence[Reason] = ()
) -> Plan:
    """What `run` would make of a folder; unless rows are to be done again, it is only read. Raises SddError."""
    if source is None:
        parts, sources = with_retry(retry, store, recipe.slice_rows)
    else:
        parts, sources = with_input(source, store, recipe.slice_rows, append)
    plan = make_plan(recipe.pinned(), parts, sources, store)
    check_folder(plan, store)
    return plan


@contextmanager
def _leaving_nothing(store: Store) -> Iterator[None]:
    """Removes the status and what killed writers left, of earlier runs and of this one, once its workers are gone."""

    def clear() -> None:
        store.clear_temporaries()
        store.remove([status.STATUS_FILE])

    clear()
    try:
        yield
    finally:
        clear()


@dataclass(frozen=True)
class Costs:
    """What the models took for a test image. `stage_s`: seconds of a worker; `row_s`: seconds of the run, with as many
    workers as there will be."""

    stage_s: Mapping[StageName, float]
    row_s: float


def ask_models(plan: Plan, settings: RunSettings, missing: Sequence[int]) -> tuple[Costs, Found]:
    """Lets every model answer once, where and as it will run, before anything is fetched. Returns what that took, and
    what was found on GPUs for settings that are auto. Raises BackendError.

    missing: the slices that will be annotated. Where the models run without the GPU that they ask for, it is said how
    long that will take.
    """
    workers = placing.workers_of(settings, cluster.nodes(), len(missing))
    rows = sum(len(plan.rows_of(index)) for index in missing)
    asked = [asking(plan.recipe, pool, rows // n) for pool, n in zip(settings.pools, workers, strict=True)]
    answers: list[dict[StageName, Answer]] = ray.get(asked)
    per_image_s = [sum(answer.took_s for answer in pool.values()) for pool in answers]
    row_s = max(s / n for s, n in zip(per_image_s, workers, strict=True))
    if settings.pools != plan.recipe.run.pools:
        _say_how_long(rows, sum(per_image_s), row_s)
    every = {stage: answer for pool in answers for stage, answer in pool.items()}
    for remark in filter(None, (answer.remark for answer in every.values())):
        print(remark, file=sys.stderr)
    found = {stage: answer.found for stage, answer in every.items() if answer.found}
    if found:
        print(f"found on the GPU: {'; '.join(found_words(found))}", file=sys.stderr)
    return Costs({stage: answer.took_s for stage, answer in every.items()}, row_s), found


def _say_how_long(rows: int, image_s: float, row_s: float) -> None:
    seconds = rows * row_s
    time_needed = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    print(
        f"without a GPU: a test image took {image_s:.1f} s; if all of the {rows:,} rows pass every stage, "
        f"the run takes about {time_needed}",
        file=sys.stderr,
    )


def asking(recipe: Recipe, pool: Pool, rows: int) -> Any:
    """Where the answers of a pool's stages will be, asked in its place. `rows`: that each of its actors will see."""
    return ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_retries=0)(_ask).remote(recipe, pool, rows)


def _ask(recipe: Recipe, pool: Pool, rows: int) -> dict[StageName, Answer]:
    """`ask` in a process of Ray's."""
    use_one_thread()
    return ask(recipe, pool.stages, pool.gpus, batches_at_once(pool), rows)


def _found_before(store: Store, settings: RunSettings) -> Found:
    """What an earlier run into the folder found for stages that again have a GPU."""
    on_gpu = {stage for pool in settings.pools if pool.gpus for stage in pool.stages}
    return {stage: found for stage, found in read_found(store).items() if stage in on_gpu}


def fetch(plan: Plan, store: Store, costs: Costs) -> None:
    """Input rows -> raw shards: downloads and screens every row by itself."""
    settings = plan.recipe.run
    missing = plan.to_fetch(store)
    if not missing:
        return
    size = min(cluster.fetch_workers(settings), len(missing))
    rows = sum(len(plan.rows_of(i)) for i in missing)
    with _phase(plan, store, ("raw",), missing, rows, {_FETCH_POOL: size}, later_row_s=costs.row_s) as ledger:
        for wave in _waves({"slice": index} for index in missing):
            cluster.drain(_fetched(wave, plan, ledger, size))


def fetch_and_annotate(plan: Plan, settings: RunSettings, store: Store, costs: Costs) -> None:
    """Input rows -> raw shards -> shards: each slice is annotated as soon as it is fetched, so that GPUs need not wait
    for the network. No duplicates may be sought.

    Where less than three quarters of the actors that could fetch alone fit beside the pools, it only fetches: to fetch
    with half of them takes longer than both phases one after the other, unless annotating takes longer than fetching.
    """
    to_fetch = plan.to_fetch(store)
    if not to_fetch:
        return
    slices, nodes = plan.missing(store, "shard"), cluster.nodes()
    workers = placing.workers_of(settings, nodes, len(slices))
    fit = placing.fetchers(settings, [cpus for cpus, _ in nodes])
    alone = min(cluster.fetch_workers(settings), fit, len(to_fetch))
    size = min(placing.fetchers_beside(settings, nodes, workers), alone)
    if 4 * size >= 3 * alone:
        # Ray starts the actors that fetch first, and would put them where those of a pool are to go.
        with cluster.room_kept(settings.pools, workers) as places:
            if places is not None:
                rows = sum(len(plan.rows_of(index)) for index in to_fetch)
                fetched = _alive(store, sorted(set(slices) - set(to_fetch)))
                pools = {_FETCH_POOL: size} | _sizes(settings, workers)
                both: tuple[Kind, ...] = ("raw", "shard")
                with _phase(plan, store, both, slices, rows, pools, costs.stage_s, fetched=fetched) as ledger:
                    for wave in _waves({"slice": index, "duplicates": []} for index in slices):
                        raw = _fetched(wave, plan, ledger, size)
                        cluster.drain(_annotated(raw, plan, ledger, settings, workers, places))
                return
    fetch(plan, store, costs)


def annotate(plan: Plan, settings: RunSettings, store: Store, costs: Costs) -> None:
    """Raw shards -> shards of captioned, grounded, segmented and selected entities."""
    missing = plan.missing(store, "shard")
    if not missing:
        return
    workers = placing.workers_of(settings, cluster.nodes(), len(missing))
    duplicates = DuplicatesBySlice(store)
    pools = _sizes(settings, workers)
    with _phase(plan, store, ("shard",), missing, _alive(store, missing), pools, stage_s=costs.stage_s) as ledger:
        for wave in _waves({"slice": index, "duplicates": duplicates.of(plan.rows_of(index))} for index in missing):
            cluster.drain(_annotated(wave, plan, ledger, settings, workers))


def _alive(store: Store, fetched: Sequence[int]) -> int:
    """How many rows of these slices came through `fetch`."""
    raw = read_ahead(store, partial(read_manifest, store, "raw"), fetched)
    return sum(manifest.counts.get("fetched", 0) for manifest in raw)


def _sizes(settings: RunSettings, workers: Sequence[int]) -> dict[str, int]:
    return {pool.name: size for pool, size in zip(settings.pools, workers, strict=True)}


def _fetched(slices: Dataset, plan: Plan, ledger: Any, size: int) -> Dataset:
    return slices.map(
        FetchWorker,
        fn_constructor_kwargs={"plan": plan, "ledger": ledger},
        compute=cluster.pool_of(size),
        num_cpus=plan.recipe.run.fetch_cpus,
    )


def _annotated(
    slices: Dataset,
    plan: Plan,
    ledger: Any,
    settings: RunSettings,
    workers: Sequence[int],
    places: Sequence[Any] | None = None,
) -> Dataset:
    """places: how the actors of each pool are to be scheduled; None: as Ray Data does."""
    for number, (pool, size) in enumerate(zip(settings.pools, workers, strict=True)):
        with warnings.catch_warnings():
            # Ray announces another way to say this for its release 2.64, and has none yet.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            slices = slices.map(
                AnnotateWorker,
                fn_constructor_kwargs={"plan": plan, "pool": pool, "ledger": ledger},
                compute=cluster.pool_of(size),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
                **({} if places is None else {"scheduling_strategy": places[number]}),
            )
    return slices


@contextmanager
def _phase(
    plan: Plan,
    store: Store,
    makes: tuple[Kind, ...],
    slices: Sequence[int],
    rows: int,
    workers: Mapping[str, int],
    stage_s: Mapping[StageName, float] | None = None,
    later_row_s: float = 0.0,
    fetched: int = 0,
) -> Iterator[Any]:
    """A phase with its ledger, in an actor of its own. Its tallies go to the screen, into the folder, and to Ray's
    metrics.

    `makes`, `slices`: the shards that the phase makes; `fetched`: rows of them that came through `fetch` in an earlier
    run, where others are fetched; the rest: see `progress.Phase`. Raises RunError when a stage failed for every row, or
    lost nearly all of the last ones for one reason; the shards of those rows are then taken back, so that the next run
    tries again.
    """
    teams = [plan.recipe.with_optional(_STAGES[kind]) for kind in makes]
    phase = progress.Phase(
        number=1 if "raw" in makes else 2,
        of=2 if len(makes) == 1 else 1,
        teams=teams,
        joining={teams[-1][0]: fetched},
        rows=rows,
        shards=plan.slices,
        shards_before=plan.slices - len(slices),
        stage_s=stage_s or {},
        later_row_s=later_row_s,
        workers=workers,
    )
    ledger = _ledger(plan.recipe, makes)
    started = time.monotonic()
    failure: SddError | None = None
    try:
        with _told(ledger, phase, store, makes[-1], plan.recipe.run.deadline_s):
            yield ledger
    except RayError as error:
        problem = ray.get(ledger.problem.remote())
        failure = in_one_line(error) if problem is None else RunError(problem)
    failure = _take_back(ledger, plan, store, makes, failure)
    if failure is not None:
        raise failure
    progress.record(store, ray.get(ledger.progress.remote()), time.monotonic() - started, cluster.nodes())


def _ledger(recipe: Recipe, makes: tuple[Kind, ...]) -> Any:
    """A `Ledger` in an actor of its own, on this node."""
    return ray.remote(num_cpus=0, scheduling_strategy=cluster.on_this_node())(Ledger).remote(
        makes=makes[-1],
        patient_with=frozenset(recipe.with_optional(FETCH_STAGES)),
        stop_share=recipe.run.stop_share,
        stop_rows=recipe.run.stop_rows,
        out_of_memory=cluster.workers_out_of_memory,
    )


@contextmanager
def _told(ledger: Any, phase: progress.Phase, store: Store, makes: Kind, deadline_s: float) -> Iterator[None]:
    """What the ledger counts goes to the screen, into the folder and to Ray's metrics, and a standstill is seen."""
    look = _latest(ledger)
    listeners = status.in_folder(store, phase), Metrics(phase, makes)
    with progress.shown(phase, look), status.telling(look, *listeners), standstill_watched(look, deadline_s):
        yield


def _take_back(
    ledger: Any, plan: Plan, store: Store, makes: tuple[Kind, ...], failure: SddError | None
) -> SddError | None:
    """Removes the shards of rows that were lost without fault of their own. Returns why the run ends, if it does."""

    def remove(stage: StageName, indices: Iterable[int]) -> None:
        # What is annotated goes with what was fetched, and not the other way round.
        kinds = makes if stage in plan.recipe.with_optional(FETCH_STAGES) else makes[-1:]
        store.remove([manifest_name(kind, index) for index in indices for kind in reversed(kinds)])

    hopeless: Hopeless | None = ray.get(ledger.hopeless.remote())
    in_vain: dict[StageName, list[int]] = ray.get(ledger.in_vain.remote())
    # In the last slices of a resumed run there may be few rows, and each may be bad by itself.
    if hopeless is not None and (failure is not None or len(hopeless.slices) == plan.slices):
        in_vain.setdefault(hopeless.stage, []).extend(hopeless.slices)
        failure = failure or RunError(hopeless.what)
    if in_vain:
        ray.get(ledger.end_phase.remote())
        for stage, indices in in_vain.items():
            remove(stage, indices)
    return failure


def _latest(ledger: Any) -> Callable[[], progress.Done]:
    """What the ledger told last, where it does not answer at once: it may be ending, with the run or by a signal."""
    told = progress.Done()

    def look() -> progress.Done:
        nonlocal told
        with suppress(RayError):
            told = progress.Done(*ray.get([ledger.progress.remote(), ledger.shards.remote()], timeout=LOOK_S))
        return told

    return look


@contextmanager
def _rays_errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except RayError as error:
        raise in_one_line(error) from None


def in_one_line(error: RayError) -> SddError:
    """An error of Ray's, or one that came to us through it: Ray's own text is a traceback of many lines."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, SddError):
        return cause
    if isinstance(cause, OutOfMemoryError):
        return RunError(
            "the memory of a node does not suffice for the models: Ray ended the worker that loaded them; take a "
            "larger node, or pools of fewer workers (run.pools[].workers)"
        )
    if isinstance(cause, RayError):
        said = next((line for line in reversed(str(cause).splitlines()) if line.strip()), type(cause).__name__)
    else:
        said = f"{type(cause).__name__}: {cause}"
    return RunError(f"a worker of Ray's failed: {one_line(said)}; the rest is in Ray's logs")


def _waves(rows: Iterable[dict[str, Any]]) -> Iterator[Dataset]:
    rows = iter(rows)
    while wave := list(itertools.islice(rows, WAVE)):
        yield ray.data.from_items(wave, override_num_blocks=len(wave))
