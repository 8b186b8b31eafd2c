"""Images as the toy Stable Diffusion redraws them: the subjects' places and colors stay, their details are its own."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from datapipe.backends.protocol import Pixels
from toyworld.pretrain.card import WEIGHTS
from toyworld.pretrain.vae import SIZE_PX

STEPS = 20  # of the whole schedule
GUIDANCE = 4.0


def redraw(image: Pixels, caption: str, strength: float, seed: int) -> Pixels:
    """image: (H, W, 3) uint8, square; strength: in 0..1, the share of the noise schedule (SDEdit, Meng et al. 2022).
    Returns an image of the same size."""
    drawn = _pipeline()(
        caption,
        image=Image.fromarray(cv2.resize(image, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA)),
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    small = (drawn * 255).round().astype(np.uint8)
    return np.asarray(cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_CUBIC), np.uint8)


@cache
def _pipeline() -> StableDiffusionImg2ImgPipeline:
    torch.set_num_threads(1)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(WEIGHTS / "stable-diffusion", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
