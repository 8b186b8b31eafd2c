"""The noise's formulas, against diffusers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import compute_snr

from model import SubjectDiffusion
from model.noise import Prediction, add_noise, min_snr_weight, signal_to_noise, target
from tests.model.bases import settings


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_target_and_signal_to_noise_are_those_of_the_scheduler(prediction: Prediction) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction)
    timesteps = torch.tensor([0, 10, 500, 999])
    latents, noise = torch.randn(4, 4, 3, 5), torch.randn(4, 4, 3, 5)
    alphas = scheduler.alphas_cumprod[timesteps]
    torch.testing.assert_close(add_noise(latents, noise, alphas), scheduler.add_noise(latents, noise, timesteps))
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target(latents, noise, alphas, prediction), wanted)
    torch.testing.assert_close(signal_to_noise(alphas), compute_snr(scheduler, timesteps))


def test_min_snr_weights_are_diffusers_and_finite_where_the_schedule_ends_in_pure_noise() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    snr = signal_to_noise(scheduler.alphas_cumprod)
    assert snr[-1] == 0
    clamped = snr.clamp(max=5)
    torch.testing.assert_close(min_snr_weight(snr, 5, "epsilon")[:-1], (clamped / snr)[:-1])
    assert min_snr_weight(snr, 5, "epsilon")[-1] == 1
    torch.testing.assert_close(min_snr_weight(snr, 5, "v_prediction"), clamped / (snr + 1))


def test_images_become_the_latents_that_the_unet_expects(sd1: Path, clip: Path) -> None:
    model = SubjectDiffusion.from_base(sd1, settings(), image_encoder=clip)
    vae = AutoencoderKL.from_pretrained(sd1, subfolder="vae")
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    with torch.no_grad():
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(model.encode_images(images), posterior.mean * vae.config.scaling_factor)
    noise = torch.randn(2, 4, 2, 3)
    drawn = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
    torch.testing.assert_close(model.encode_images(images, noise), drawn)
    assert model.latent_factor == 8
