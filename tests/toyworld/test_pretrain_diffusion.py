"""The small Stable Diffusion: a few steps of training, and what they are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPModel

from toyworld.pretrain import card, diffusion, perception, vae
from toyworld.pretrain.loop import LoopSettings, train
from toyworld.pretrain.scenes import load_scenes
from toyworld.pretrain.text_alignment import caption_similarity, noun_rates
from toyworld.pretrain.widen import begin_from
from toyworld.render import render_scene

TINY = ["--steps", "2", "--scenes", "20", "--heldout", "16", "--out", "stable-diffusion"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stable-diffusion after two steps of training of each part, through their own commands."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # scenes and checkpoints go to out/pretrain there
        patch.setattr(diffusion, "SAMPLING_STEPS", 2)
        patch.setattr(diffusion, "WATCHED", 8)
        vae.main([*TINY, "--decoder-steps", "1"])
        diffusion.main(TINY)
    return folder


@pytest.fixture(scope="module")
def pipeline(trained: Path) -> Any:
    loaded = StableDiffusionPipeline.from_pretrained(trained / "stable-diffusion", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_folder_loads_as_the_hubs_does_and_draws(pipeline: Any) -> None:
    image = pipeline("a red star on grass", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    wide = pipeline("a red star on grass", num_inference_steps=2, height=64, width=96, output_type="np").images
    assert wide.shape == (1, 64, 96, 3)


def test_the_same_prompt_and_seed_draw_the_same_whatever_is_drawn_beside(pipeline: Any) -> None:
    both = diffusion.sample(pipeline, ["a red star", "a blue fish on sand"])
    alone = diffusion.sample(pipeline, ["a red star"])
    assert np.abs(both[0].astype(int) - alone[0]).max() <= 1


def test_latents_have_unit_variance_after_the_measured_scale(pipeline: Any) -> None:
    images = np.stack([render_scene(seed, size=64).image for seed in range(20)])
    latents = vae.latents_of(pipeline.vae, images) * pipeline.vae.config.scaling_factor
    assert latents.shape == (20, vae.LATENT_CHANNELS, 16, 16)
    assert latents.std().item() == pytest.approx(1, abs=0.02)


def test_decoded_images_differ_from_the_true_ones_by_what_the_psnr_says(trained: Path, pipeline: Any) -> None:
    scenes = load_scenes(16, "heldout", size=64, cache=trained / "out/pretrain")
    gap = (vae.decoded(pipeline.vae, scenes.images) / 255.0 - scenes.images / 255.0) ** 2
    psnr_db = -10 * np.log10(gap.mean(axis=(1, 2, 3))).mean()
    recorded = json.loads((trained / "stable-diffusion/vae/scores.json").read_text())["scores"]["psnr_db"]
    assert psnr_db == pytest.approx(recorded, abs=0.05)


def test_scores_say_how_far_the_autoencoder_lets_samples_come(trained: Path) -> None:
    scores = json.loads((trained / "stable-diffusion/scores.json").read_text())["scores"]
    share = scores["clip_score_of_decoded_images"] / scores["clip_score_of_true_images"]
    assert scores["clip_score_ratio_of_decoded"] == pytest.approx(share, abs=0.01)


def test_a_checkpoint_leaves_samples_and_a_point_of_the_curve(trained: Path) -> None:
    work = trained / "out/pretrain/diffusion"
    picture = cv2.imread(str(work / "samples-000002.png"))
    assert picture is not None
    assert picture.shape == (64, 8 * 64, 3)
    step, ratio = (work / "curve.csv").read_text().strip().split(",")
    assert step == "2"
    assert -1 < float(ratio) < 1


def test_the_text_encoder_is_the_toy_clips(pipeline: Any) -> None:
    clip = CLIPModel.from_pretrained(card.WEIGHTS / "clip", dtype=torch.float32)
    tokens = diffusion.encode_captions(pipeline.tokenizer, ["a red star", ""])
    with torch.no_grad():
        torch.testing.assert_close(
            pipeline.text_encoder(tokens).last_hidden_state, clip.text_model(tokens).last_hidden_state
        )


def test_weights_are_stored_in_half_precision_with_their_scores(trained: Path) -> None:
    folder = trained / "stable-diffusion"
    for path in folder.rglob("*.safetensors"):
        assert {weight.dtype for weight in load_file(path).values()} == {torch.float16}
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 16e6
    for path in (folder, folder / "vae"):
        record = json.loads((path / "scores.json").read_text())
        assert record["steps"] == 2
        assert record["scores"]["scenes"] == 16


def test_the_card_names_the_pipeline_and_its_autoencoder(trained: Path) -> None:
    text = card.card(trained)
    assert "## stable-diffusion\n" in text
    assert "## stable-diffusion/vae\n" in text
    assert "python -m toyworld.pretrain.diffusion " in text


class _Reader(nn.Module):
    """Stands for the text encoder: a table of states for tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, diffusion.TEXT_WIDTH)

    def forward(self, tokens: Tensor) -> Any:
        return type("Output", (), {"last_hidden_state": self.table(tokens)})


def _train_unet(folder: Path, stop_after: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    latents, tokens = torch.randn(6, vae.LATENT_CHANNELS, 8, 8), torch.randint(9, (6, 5))
    draw = diffusion.batches(np.full(6, 1 / 6), seed=0, images=4)
    loss = diffusion.diffusion_loss(latents, tokens, tokens[0], _Reader(), diffusion.build_scheduler())

    def batch_at(step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if step == stop_after:
            raise KeyboardInterrupt
        return draw(step)

    unet = diffusion.build_unet()
    average = train(unet, batch_at, loss, LoopSettings(4, lr=1e-3, warmup=2, checkpoint_s=0.0), folder)
    return [*unet.parameters(), *average.parameters()]


def test_a_training_that_was_interrupted_ends_at_the_very_same_weights(tmp_path: Path) -> None:
    whole = _train_unet(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train_unet(tmp_path / "parts", stop_after=2)
    parts = _train_unet(tmp_path / "parts")
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_the_loss_of_a_unet_that_knows_v_is_zero() -> None:
    scheduler = diffusion.build_scheduler()
    latents, tokens = torch.randn(4, 2, 8, 8), torch.zeros(4, 5, dtype=torch.int64)

    def oracle(noisy: Tensor, timesteps: Tensor, states: Tensor) -> Any:
        signal = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
        noise = (noisy - signal * latents) / (1 - signal**2).sqrt()
        return type("Output", (), {"sample": signal * noise - (1 - signal**2).sqrt() * latents})

    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    loss = diffusion.diffusion_loss(latents, tokens, tokens[0], _Reader(), scheduler)
    assert loss(oracle, np.arange(4))[0].item() == pytest.approx(0, abs=1e-6)


def test_the_schedule_ends_in_pure_noise() -> None:
    scheduler = diffusion.build_scheduler()
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-6)
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999


def test_large_subjects_are_drawn_more_often_and_small_ones_never(tmp_path: Path) -> None:
    scenes = load_scenes(40, size=64, cache=tmp_path)
    share = diffusion.shares(scenes)
    for row, count in enumerate(scenes.counts):
        x1, y1, x2, y2 = scenes.boxes[row, :count].T
        assert (share[row] > 0) == (np.maximum(x2 - x1, y2 - y1) >= 0.35 * 64).all()
    drawn = share[share > 0] * len(share)
    counts = scenes.counts[share > 0]
    assert drawn[counts == 1].mean() == pytest.approx(1.5 * drawn[counts == 2].mean())
    rows = diffusion.batches(np.array([0.25, 0.0, 0.75]), seed=0, images=4000)(0)
    assert np.bincount(rows, minlength=3) / 4000 == pytest.approx([0.25, 0, 0.75], abs=0.03)


def test_a_perfect_reconstruction_costs_nothing_and_a_blurred_edge_costs_more_than_a_shifted_mean() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1
    blurred = nn.functional.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    even = torch.ones(1, 1, 16, 16)
    assert vae.pyramid_loss(image, image, even).item() == 0
    assert vae.edge_loss(image, image, even).item() == 0
    assert vae.edge_loss(image, image + 0.1, even).item() == pytest.approx(0, abs=1e-6)
    assert vae.edge_loss(image, blurred, even) > 0.05


def test_an_error_on_a_subject_costs_more_than_the_same_on_the_background(tmp_path: Path) -> None:
    scenes = load_scenes(4, size=64, cache=tmp_path)
    batch = vae.batches(scenes, seed=0)(0)
    shown = batch.weight == batch.weight.max()
    on_subjects, beside = (batch.pixels + 0.1 * where for where in (shown, ~shown))
    subjects, background = (
        vae.painting_loss(image, batch.pixels, batch.weight) / where.float().mean()
        for image, where in ((on_subjects, shown), (beside, ~shown))
    )
    assert subjects > 2 * background


def test_an_image_is_nearer_to_itself_blurred_than_to_another_scene_and_only_the_first_is_learnt() -> None:
    pixels = vae.to_pixels(np.stack([render_scene(seed, size=64).image for seed in range(8)]))
    blurred = nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    distance = perception.Perception()
    mine, its = blurred.clone().requires_grad_(), pixels.clone().requires_grad_()
    near = distance(mine, its)
    near.backward()
    assert distance(pixels, pixels).item() == 0
    assert near < distance(pixels.roll(1, 0), pixels) / 2
    assert mine.grad is not None
    assert its.grad is None


def test_an_autoencoder_that_is_widened_decodes_as_before_and_takes_notice_of_what_is_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = vae.to_pixels(np.stack([render_scene(seed, size=64).image for seed in range(2)]))
    wide: Any = vae.build_vae()
    with monkeypatch.context() as patch:
        patch.setattr(vae, "LATENT_CHANNELS", 4)
        narrow: Any = vae.build_vae()
    begin_from(wide, narrow.state_dict())
    known, latents = narrow.encode(pixels).latent_dist, wide.encode(pixels).latent_dist
    torch.testing.assert_close(latents.mean[:, :4], known.mean)
    torch.testing.assert_close(latents.std[:, :4], known.std)
    assert latents.mean[:, 4:].std() > 0.3 * known.mean.std()
    shown = wide.decode(latents.mean).sample
    torch.testing.assert_close(shown, narrow.decode(known.mean).sample)
    shown.square().mean().backward()
    assert wide.decoder.conv_in.weight.grad[:, 4:].abs().amax(dim=(0, 2, 3)).min() > 0


def test_a_unet_that_is_widened_says_the_same_of_the_latents_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    wide: Any = diffusion.build_unet()
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "LATENT_CHANNELS", 4)
        narrow: Any = diffusion.build_unet()
    begin_from(wide, narrow.state_dict())
    noisy, states = torch.randn(1, vae.LATENT_CHANNELS, 8, 8), torch.randn(1, 5, diffusion.TEXT_WIDTH)
    with torch.no_grad():
        said = wide(noisy, 500, states).sample[:, :4]
        torch.testing.assert_close(said, narrow(noisy[:, :4], 500, states).sample)


def test_weights_of_another_architecture_are_no_beginning() -> None:
    with pytest.raises(ValueError, match="another architecture"):
        begin_from(nn.Linear(2, 2), nn.Linear(2, 2, bias=False).state_dict())


def test_the_weights_that_come_along_draw_what_captions_say() -> None:
    committed = StableDiffusionPipeline.from_pretrained(card.WEIGHTS / "stable-diffusion", dtype=torch.float32)
    committed.set_progress_bar_config(disable=True)
    scenes = [render_scene(seed, size=64, split="heldout") for seed in range(500, 524)]
    captions = [scene.caption for scene in scenes]
    drawn, true = diffusion.sample(committed, captions), np.stack([scene.image for scene in scenes])
    score = caption_similarity(card.WEIGHTS / "clip", drawn, captions)
    assert score > 0.7 * caption_similarity(card.WEIGHTS / "clip", true, captions)
    assert score > 2 * caption_similarity(card.WEIGHTS / "clip", drawn, [*captions[1:], captions[0]])


def test_true_images_show_their_nouns_and_their_captions() -> None:
    scenes = [render_scene(seed, size=64, split="heldout") for seed in range(30)]
    images, captions = np.stack([scene.image for scene in scenes]), [scene.caption for scene in scenes]
    nouns = [sorted({subject.tag for subject in scene.subjects}) for scene in scenes]
    found, made_up = noun_rates(card.WEIGHTS / "grounding-dino", images, nouns)
    assert found > 0.9
    assert made_up < 0.2
    own = caption_similarity(card.WEIGHTS / "clip", images, captions)
    assert own > 2 * caption_similarity(card.WEIGHTS / "clip", images, [*captions[1:], captions[0]])
