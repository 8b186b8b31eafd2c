"""The command line that all trainings share, and how it is written down."""

from __future__ import annotations

import argparse
from pathlib import Path

from toyworld.pretrain.loop import processes


def parser(description: str | None, steps: int, out: Path, work: Path) -> argparse.ArgumentParser:
    """Options of every training, with these defaults."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--scenes", type=int, default=20_000, help="training scenes, seeds 0 … scenes - 1")
    made.add_argument("--heldout", type=int, default=500, help="held-out scenes to score on")
    made.add_argument("--out", type=Path, default=out, help="folder of the weights")
    made.add_argument("--work", type=Path, default=work, help="folder of the checkpoints")
    return made


def as_typed(module: str, args: argparse.Namespace) -> str:
    """The command that makes the same weights: what it begins from, and every number but those that only score them."""
    launcher = f"torchrun --nproc-per-node {processes()}" if processes() > 1 else "python"
    said = {
        name: value
        for name, value in vars(args).items()
        if (isinstance(value, int | float) and name != "heldout") or (name == "begin" and value)
    }
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in said.items())
    return f"{launcher} -m toyworld.pretrain.{module} {options}"
