"""The subject model that comes along: what a run of `sdd train` has learned, without its base, and its scores.

    sdd train --out out/subject --set optimizer.steps=6000
    sdd evaluate out/subject --out out/subject/one
    sdd evaluate out/subject --subjects 2 --cases 48 --out out/subject/two
    python -m toyworld.pretrain.subject --run out/subject --minutes 110 \
        --report out/subject/one --report out/subject/two

Leaves the subject net in fp16, the recipe, which names the base and the image encoder, `scores.json`, and the first
report, which `sdd evaluate` compares others with.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from datapipe.shards.store import Store
from subject_diffusion.settings import leaves, load_settings
from toyworld.pretrain.card import WEIGHTS, save_half
from train.evaluation.report import REPORT, Report
from train.sampling.trained import SHIPPED
from train.trainer.pipeline import open_pipeline, read_recipe
from train.trainer.recipe import TrainRecipe
from train.trainer.run_folder import NET, RECIPE

MADE_BY = "train-toy"
"""The recipe that the run changed; paths and placing are taken from it."""


def command_of(recipe: TrainRecipe) -> str:
    """The `sdd train` whose run learns this."""
    plain = dict(leaves(load_settings(TrainRecipe, Path(MADE_BY), []).model_dump(mode="json")))
    changed = [
        f"--set {key}={value}" for key, value in leaves(recipe.model_dump(mode="json")) if plain.get(key) != value
    ]
    return " ".join(["sdd train", *changed])


def scores_of(report: Report) -> dict[str, float]:
    """Means over all images, by names that say how many subjects these had."""
    whole, subjects = report.groups["all"], report.asked.subjects
    found = {
        f"{metric} by {way}, {subjects} subject(s)": mean.mean
        for way, by_metric in whole.means.items()
        for metric, mean in by_metric.items()
    }
    return {name: round(value, 4) for name, value in found.items()} | {f"images, {subjects} subject(s)": whole.images}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of `sdd train`")
    parser.add_argument("--report", type=Path, action="append", default=[], help="folder of a report on it")
    parser.add_argument("--minutes", type=int, required=True, help="how long the run took")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "subject-diffusion")
    args = parser.parse_args(argv)
    plain, recipe = load_settings(TrainRecipe, Path(MADE_BY), []), read_recipe(args.run)
    kept = recipe.model_copy(
        update={
            "sources": plain.sources,
            "base": plain.base,
            "image_encoder": plain.image_encoder,
            "run": plain.run,
            "validation": plain.validation,
        }
    )
    net = open_pipeline(args.run).subject_net
    net.register_to_config(_name_or_path=f"{SHIPPED}/{NET}")  # not where the run lies on this machine
    save_half(net, args.out / NET)
    store = Store(str(args.out))
    store.put(RECIPE, (kept.model_dump_json(indent=1) + "\n").encode())
    record = {
        "command": command_of(kept),
        "wall_clock_s": 60 * args.minutes,
        "steps": recipe.optimizer.steps,
        "seed": recipe.seed,
        "machine": f"{os.cpu_count()} CPU cores, {recipe.run.workers} of them used",
        "scores": {
            name: value
            for folder in args.report
            for name, value in scores_of(Report.from_json(json.loads((folder / REPORT).read_text()))).items()
        },
    }
    for folder in args.report[:1]:
        store.put(REPORT, (folder / REPORT).read_bytes())
    store.put("scores.json", (json.dumps(record, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
