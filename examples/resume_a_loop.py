"""A training loop that can be stopped after any batch: `python examples/resume_a_loop.py out/toy`.

The model only learns the mean color of the images, so that the loop stays in view. What matters: the stream's state is
saved together with the model, and the rest of the epoch is then the same as without a stop.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from subject_diffusion import Stream, StreamLoader, SubjectTransform


def loader(data: str) -> StreamLoader:
    transform = SubjectTransform(size_px=64, max_subjects=2)
    return StreamLoader(Stream(data, batch_size=8, transform=transform, seed=0), workers=2)


def step(color: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return color + 0.1 * (batch["image"].float().mean((0, 2, 3)) - color)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a dataset folder")
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        color = torch.zeros(3)
        batches = loader(data)
        for number, batch in enumerate(batches, 1):
            color = step(color, batch)
            if number == 3:
                torch.save({"color": color, "stream": batches.state_dict()}, checkpoint)
        print(f"undisturbed: {number} batches, color {color.tolist()}")

        saved = torch.load(checkpoint, weights_only=True)
        resumed, batches = saved["color"], loader(data)
        batches.load_state_dict(saved["stream"])
        for batch in batches:
            resumed = step(resumed, batch)
        print(f"resumed after batch 3: color {resumed.tolist()}")
    print("equal" if torch.equal(color, resumed) else "NOT equal")


if __name__ == "__main__":
    main()
