"""Changes thresholds without a model: the candidates that a run recorded go through selection again, shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from datapipe.isolation import run_stage
from datapipe.ledger import Ledger
from datapipe.plan import Plan, check_folder, claim_folder, code_hash, read_run
from datapipe.recipe import Recipe, build_stage, recipe_of_run
from datapipe.schema import Sample, Slice, StageName
from datapipe.shards import (
    Manifest,
    Provenance,
    Store,
    manifests,
    present,
    read_manifest,
    read_slice,
    write_shard,
)
from datapipe.stages.stage import Stage
from subject_diffusion.errors import RecipeError, RunError, ShardError


def reselect(path: str, overrides: Sequence[str], new: str) -> Iterator[tuple[int, int]]:
    """Fills the folder `new` with what a full run of the recipe of `path` with these `select.*` settings would give,
    except for the raw shards.

    Yields (shards done, shards in all). When killed and called again, it continues. Raises SddError.
    """
    old = Store(path, create=False)
    plan = _plan(old, overrides, new)
    target = Store(new)
    if old.url == target.url:
        raise RunError(f"{new}: is the dataset itself; choose another folder with --out")
    stage = build_stage(StageName.SELECT, plan.recipe)
    with target.lock():
        target.clear_temporaries()
        check_folder(plan, target)
        claim_folder(plan, target)
        done = set(present(target, "shard"))
        for manifest in manifests(old, "shard"):
            if manifest.index not in done:
                write_shard(
                    target, "shard", _reselected(stage, old, manifest, plan), plan.provenance_of(manifest.index)
                )
                done.add(manifest.index)
            yield len(done), plan.slices


def _reselected(stage: Stage, old: Store, manifest: Manifest, plan: Plan) -> Slice:
    samples = run_stage(
        stage,
        [_before_selection(s) for s in read_slice(old, manifest).samples],
        slice_index=manifest.index,
        ledger=Ledger(),
        deaths=Counter(),
        deadline_s=plan.recipe.run.deadline_s,
    )
    return Slice(manifest.index, _with_images(old, manifest, samples))


def _plan(old: Store, overrides: Sequence[str], new: str) -> Plan:
    """The plan of a full run into `new`, from the record of the run in `old`."""
    before = read_run(old)
    recipe = recipe_of_run(before.identity, overrides)
    _check_change(old, before.recipe, recipe)
    made_with = Provenance(recipe.hash(), code_hash(), before.parts[-1].input, before.models)
    plan = Plan(recipe, before.parts, {}, new, made_with)
    if lacking := plan.missing(old, "shard"):
        raise ShardError(f"{old.root}: {len(lacking)} of {plan.slices} shards are missing; `sdd dataset` makes them")
    return plan


def _check_change(old: Store, before: Recipe, after: Recipe) -> None:
    was, now = before.identity(), after.identity()
    changed = [key for key in now | was if now.get(key) != was.get(key)]
    if not changed:
        raise RecipeError(f"{old.root} has these settings already; change one with --set select.min_score=0.4")
    for key in changed:
        if not key.startswith("select."):
            raise RecipeError(f"{key}: changing it needs a model run, `sdd dataset`; reselect changes only select.*")


def _before_selection(sample: Sample) -> Sample:
    """Takes the verdict away from a row that reached selection; the others keep theirs."""
    reached = sample.verdict is not None and sample.verdict.stage is StageName.SELECT
    return sample.replace(verdict=None) if reached else sample


def _with_images(old: Store, manifest: Manifest, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Adds the images of newly kept rows, from the raw shard."""
    lacking = [s for s in samples if s.image is None and s.is_kept]
    if not lacking:
        return tuple(samples)
    if manifest.index not in present(old, "raw"):
        raise ShardError(
            f"{old.root}: row {lacking[0].key} would now be kept, but its image went with the raw shards; "
            "choose stricter settings, or make the dataset again"
        )
    raw = {s.row: s.image for s in read_slice(old, read_manifest(old, "raw", manifest.index)).samples}
    return tuple(s if s.image is not None else s.replace(image=raw[s.row]) for s in samples)
