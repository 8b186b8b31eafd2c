"""The model card of the toy weights: every folder's scores.json gathered in one README.

python -m toyworld.pretrain.card --weights toyworld/weights
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from subject_diffusion.storage import whole_file
from toyworld.pretrain.command import as_typed
from toyworld.pretrain.loop import processes

WEIGHTS = Path(__file__).parents[1] / "weights"

_INTRO = """# Weights of the toy world

Tiny models of the hub's architectures, trained on scenes drawn by `toyworld.render` alone, so that everything here runs
offline. They know the toy world's nouns and nothing else. Each folder is in hub format (fp16 safetensors,
processor, tokenizer) and loads with the same `from_pretrained` as the large models; on CPU pass `dtype=torch.float32`.

Scores are on held-out scenes (`split="heldout"`: identities that no training scene shows), of the fp16 weights
as they lie here. Each `scores.json` has the command; where it does not give these weights when it is run once from its
start, its note says why. The weights are the project's own, Apache-2.0.
"""


def save_pretrained(model: Any, processor: ProcessorMixin, folder: Path) -> None:
    """Model and processor in hub format, weights in fp16; `model` itself keeps its own precision."""
    save_half(model, folder)
    processor.save_pretrained(folder)


def save_half(model: Any, folder: Path) -> None:
    """The model alone in hub format, as `save_pretrained` does."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)


def write_scores(
    folder: Path, module: str, args: argparse.Namespace, wall_clock_s: float, scores: Mapping[str, float | int]
) -> None:
    """`scores.json` beside the weights: what was run (its arguments too), for how long, and what it reached."""
    record = {
        "command": as_typed(module, args),
        "wall_clock_s": round(wall_clock_s),
        "steps": args.steps,
        "seed": args.seed,
        "data_seeds": f"0 to {args.scenes - 1}",
        "machine": f"{os.cpu_count()} CPU cores, {processes()} of them used",
        "scores": {name: round(value, 4) for name, value in scores.items()},
    }
    with whole_file(folder / "scores.json") as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())


def card(weights: Path) -> str:
    """The README's text for the model folders in `weights`, in the order of their names."""
    parts = [_INTRO]
    for path in sorted(weights.rglob("scores.json")):
        record = json.loads(path.read_text())
        megabytes = sum(file.stat().st_size for file in path.parent.rglob("*.safetensors")) / 1e6
        name = path.parent.relative_to(weights)
        parts.append(f"## {name}\n\n{_facts(record, megabytes)}\n{_table(record.get('scores', {}))}")
    return "\n".join(parts)


def _facts(record: Mapping[str, Any], megabytes: float) -> str:
    lines = [f"- size: {megabytes:.1f} MB"]
    for name, value in record.items():
        if name == "command":
            lines.append(f"- command: `{value}`")
        elif name == "wall_clock_s":
            lines.append(f"- wall clock: {value / 60:.0f} min")
        elif name != "scores":
            lines.append(f"- {name.replace('_', ' ')}: {value}")
    return "\n".join(lines) + "\n"


def _table(scores: Mapping[str, Any]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in scores.items()]
    return "\n".join(["| score | value |", "|---|---|", *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    weights = parser.parse_args().weights
    (weights / "README.md").write_text(card(weights))


if __name__ == "__main__":
    main()
