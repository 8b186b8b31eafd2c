"""A batch of the stream, encoded by the frozen models: what the subject model is called with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from model import SubjectDiffusion, TrainingBatch
from train.trainer.examples import ExampleBatch


def encode(model: SubjectDiffusion, batch: ExampleBatch, device: torch.device, offset_noise: float) -> TrainingBatch:
    """offset_noise: share of a noise that is constant over each channel."""
    on = {n: v.to(device, non_blocking=True) for n, v in batch.items() if isinstance(v, Tensor)}
    if "references" in on:
        classes, patches = model.encode_references(on["references"], on["present"])
    else:
        classes, patches = (on[part].to(model.image_encoder.dtype) for part in ("classes", "patches"))
    sides = torch.tensor(on["image"].shape[-2:], device=device)
    noise = on["noise"][:, 0] + offset_noise * on["offset"]
    known = on.get("posterior")
    drawn = on["noise"][:, 1]
    encoded = TrainingBatch(
        latents=model.encode_images(on["image"], drawn) if known is None else model.draw_latents(known.float(), drawn),
        noise=noise,
        timesteps=(on["timestep_draw"] * model.num_train_timesteps).long().clamp(max=model.num_train_timesteps - 1),
        condition_draw=on["condition_draw"],
        prompts=model.prompt_tokenizer(batch["caption"], [[t for t in tags if t] for tags in batch["tags"]]),
        classes=classes,
        patches=patches,
        boxes=on["boxes"],
        masks=functional.avg_pool2d(on["masks"].float(), model.latent_factor),
        present=on["present"],
        time_ids=torch.cat([on["original_size"], on["crop_top_left"], sides.expand(len(noise), 2)], dim=1).float(),
    )
    return encoded.to(device, non_blocking=True)
