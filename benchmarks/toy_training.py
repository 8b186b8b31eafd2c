"""What a training step of the toy subject model costs beside one of its base, after `make dataset`:
`python benchmarks/toy_training.py`.

Both on one thread, in bfloat16, 16 images at a time. CPU time, so that other programs matter less; ratios to the base's
step alone mean something.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from rich.console import Console
from rich.table import Table

from subject_diffusion.settings import load_settings
from toyworld.pretrain.diffusion import build_scheduler, diffusion_loss, encode_captions
from train.trainer.encode import encode
from train.trainer.examples import ExampleBatch
from train.trainer.loop import Trainer
from train.trainer.losses import ForwardPass, total_and_losses
from train.trainer.recipe import TrainRecipe

IMAGES, WARM_UP = 16, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="out/toy", help="a toy dataset")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shown = Table("step of", "slots", "CPU time, base = 1", "of it frozen encoders", box=None)
    base_s = None
    for slots in (2, 4):
        trainer = open_trainer(arguments.data, slots)
        batches = list(itertools.islice(trainer.loader, WARM_UP + arguments.steps))
        if base_s is None:
            base_s = seconds(base_step(trainer), batches)
            shown.add_row("the base's UNet", "", "1.00", "")
        encoding, whole = seconds(encoding_step(trainer), batches), seconds(subject_step(trainer), batches)
        shown.add_row("the subject model", str(slots), f"{whole / base_s:.2f}", f"{encoding / base_s:.2f}")
    Console().print(shown)


def open_trainer(data: str, slots: int) -> Trainer:
    changes = ("run.workers=1", "run.precision=bfloat16", f"run.micro_batch={IMAGES}", f"model.max_subjects={slots}")
    recipe = load_settings(TrainRecipe, Path("train-toy"), changes)
    source = dataclasses.replace(recipe.sources[0], path=data)
    recipe = recipe.model_copy(update={"sources": (source,)})
    with tempfile.TemporaryDirectory() as out:
        return Trainer(recipe, Path(out), torch.device("cpu"))


def seconds(step: Callable[[ExampleBatch], Any], batches: Sequence[ExampleBatch]) -> float:
    """CPU time of all steps but the first few."""
    for batch in batches[:WARM_UP]:
        step(batch)
    start = time.process_time()
    for batch in batches[WARM_UP:]:
        step(batch)
    return time.process_time() - start


def base_step(trainer: Trainer) -> Callable[[ExampleBatch], None]:
    """Forward and backward of the whole UNet, on latents that were encoded beforehand, as in pretraining."""
    model = trainer.model
    unet = type(model.unet).from_config(model.unet.config).train()
    unet.set_attn_processor(AttnProcessor())  # as in pretraining
    channels, side = model.unet.config.in_channels, trainer.recipe.examples.size_px // model.latent_factor
    latents = torch.randn(IMAGES, channels, side, side)
    *tokens, nothing = encode_captions(model.tokenizer, ["a mug and a fish on grass"] * IMAGES + [""])
    text = model.subject_net.text_encoder
    loss = diffusion_loss(latents, torch.stack(tokens), nothing, text, build_scheduler())

    def step(_: ExampleBatch) -> None:
        loss(unet, np.arange(IMAGES))[0].backward()

    return step


def encoding_step(trainer: Trainer) -> Callable[[ExampleBatch], Any]:
    """Images and references, by the frozen encoders."""
    return lambda batch: encode(trainer.model, batch, torch.device("cpu"), 0)


def subject_step(trainer: Trainer) -> Callable[[ExampleBatch], None]:
    """As `sdd train` does it, but the optimizer's."""
    encoded = encoding_step(trainer)

    def step(batch: ExampleBatch) -> None:
        learned = encoded(batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = trainer.model(learned)
        total_and_losses(ForwardPass(trainer.recipe, trainer.model, learned, found))[0].backward()

    return step


if __name__ == "__main__":
    main()
