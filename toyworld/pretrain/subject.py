"""The bundled subject model: what a run of `sdd train` has learned, without its base, and its scores.

    sdd train --out out/first --set optimizer.steps=6000 --set examples.drop_subjects=0
    sdd train --out out/second --set init_from=out/first --set optimizer.steps=3000 --set optimizer.lr=0.0003
    sdd train --out out/subject --set init_from=out/second --set optimizer.steps=3000 --set optimizer.lr=0.0003
    python -m toyworld.pretrain.subject --run out/subject --steps 12000 --minutes 234
    sdd evaluate toyworld/weights/subject-diffusion --out out/one
    sdd evaluate toyworld/weights/subject-diffusion --subjects 2 --cases 48 --out out/two
    python -m toyworld.pretrain.subject --report out/one --report out/two

With --run, leaves the subject net in fp16, the recipe, which names the base and the image encoder, and `scores.json`.
With --report, adds the scores of these fp16 weights, and the first report, which `sdd evaluate` compares others with.
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

SCORES = "scores.json"
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


def pack(run: Path, steps: int | None, minutes: int, out: Path) -> None:
    """The net, its recipe and how it was made. steps, minutes: of the training in all; steps: by default the run's."""
    plain, recipe = load_settings(TrainRecipe, Path(MADE_BY), []), read_recipe(run)
    kept = recipe.model_copy(
        update={
            "sources": plain.sources,
            "base": plain.base,
            "image_encoder": plain.image_encoder,
            "run": plain.run,
            "validation": plain.validation,
        }
    )
    net = open_pipeline(run).subject_net
    net.register_to_config(_name_or_path=f"{SHIPPED}/{NET}")  # not where the run lies on this machine
    save_half(net, out / NET)
    record = {
        "command": command_of(kept),
        "wall_clock_s": 60 * minutes,
        "steps": steps or recipe.optimizer.steps,
        "seed": recipe.seed,
        "machine": f"{os.cpu_count()} CPU cores, {recipe.run.workers} of them used",
    }
    store = Store(str(out))
    store.put(RECIPE, (kept.model_dump_json(indent=1) + "\n").encode())
    store.put(SCORES, (json.dumps(record, indent=2) + "\n").encode())


def add_scores(reports: Sequence[Path], out: Path) -> None:
    """reports: folders of `sdd evaluate`."""
    scores: dict[str, float] = {}
    for folder in reports:
        scores |= scores_of(Report.from_json(json.loads((folder / REPORT).read_text())))
    record = json.loads((out / SCORES).read_text()) | {"scores": scores}
    store = Store(str(out))
    store.put(REPORT, (reports[0] / REPORT).read_bytes())
    store.put(SCORES, (json.dumps(record, indent=2) + "\n").encode())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run of `sdd train`")
    parser.add_argument("--steps", type=int, help="of the training in all; by default the run's")
    parser.add_argument("--minutes", type=int, default=0, help="that the training took in all")
    parser.add_argument("--report", type=Path, action="append", help="folder of a report of `sdd evaluate`")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "subject-diffusion")
    args = parser.parse_args(argv)
    if args.run:
        pack(args.run, args.steps, args.minutes, args.out)
    if args.report:
        add_scores(args.report, args.out)


if __name__ == "__main__":
    main()
