"""The model in training: it starts as its base, and learns from every condition."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from model import ModelError, SubjectDiffusion, TrainingBatch
from model.diffusion import dropped_conditions
from tests.model.bases import CLIP_SIZE, assert_same, awaken, settings, training_batch


def _noisy(model: SubjectDiffusion, batch: TrainingBatch) -> torch.Tensor:
    alpha = model.alphas_cumprod[batch.timesteps][:, None, None, None]
    return alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise


@pytest.mark.parametrize("adapter", [{}, {"adapter_start": "open", "adapter_reach": "boxes"}], ids=["paper", "open"])
@pytest.mark.parametrize("size", [(8, 8), (10, 7)], ids=["square", "odd"])
def test_a_new_model_predicts_what_its_base_predicts(
    base: Path, clip: Path, size: tuple[int, int], adapter: dict[str, str]
) -> None:
    model = SubjectDiffusion.from_base(base, settings(**adapter), image_encoder=clip)
    stock = StableDiffusionPipeline.from_pretrained(base)
    batch = training_batch(model, height=size[0], width=size[1])
    ids = stock.tokenizer(["a red mug", "a dog", ""], padding="max_length", return_tensors="pt").input_ids
    plain = model.prompt_tokenizer(["a red mug", "a dog", ""], [[], [], []])
    assert torch.equal(plain.ids, ids)
    with torch.no_grad():
        expected_text = stock.text_encoder(ids)[0]
        classes, patches = torch.randn(3, 3, 12), torch.randn(3, 3, 16, 16)
        text = model.subject_net.encode_prompt(plain.ids, plain.placeholders, classes)
        assert_same(text.states, expected_text)
        tokens = model.subject_net.encode_subjects(patches, batch.boxes, batch.present)
        cells = model.subject_net.cells_reached(batch.boxes, batch.present, size)
        conditions = text, tokens, torch.ones(3, 1, *size)
        found, _ = model.subject_net.denoise(model.unet, batch.latents, batch.timesteps, *conditions, cells=cells)
        expected = stock.unet(batch.latents, batch.timesteps, encoder_hidden_states=expected_text).sample
    assert_same(found, expected)


def test_the_losses_are_those_written_out(base: Path, clip: Path) -> None:
    model = SubjectDiffusion.from_base(base, settings(), image_encoder=clip)
    batch = training_batch(model)
    losses = model(batch)
    stock = StableDiffusionPipeline.from_pretrained(base)
    nothing = batch.prompts.placeholders[2:]
    text = model.subject_net.encode_prompt(batch.prompts.ids[2:], nothing, torch.zeros(1, 3, 12))
    prediction = stock.unet(_noisy(model, batch)[2:], batch.timesteps[2:], encoder_hidden_states=text.states).sample
    alpha = model.alphas_cumprod[900]
    wanted = batch.noise[2]
    if stock.scheduler.config.prediction_type == "v_prediction":
        wanted = alpha.sqrt() * batch.noise[2] - (1 - alpha).sqrt() * batch.latents[2]
    torch.testing.assert_close(losses.diffusion[2], ((prediction[0] - wanted) ** 2).mean())
    assert losses.attention[2] == 0
    assert (losses.attention[:2] != 0).all()


def test_every_trainable_parameter_and_no_other_learns(base: Path, clip: Path) -> None:
    model = awaken(SubjectDiffusion.from_base(base, settings(), image_encoder=clip)).train()
    losses = model(training_batch(model))
    (losses.diffusion.mean() + model.settings.attention_weight * losses.attention.mean()).backward()
    unused = [n for n, p in model.subject_net.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert unused == []
    assert all(p.grad is None for part in (model.unet, model.vae, model.image_encoder) for p in part.parameters())


def test_gradient_checkpointing_changes_no_gradient(base: Path, clip: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = awaken(SubjectDiffusion.from_base(base, settings(), image_encoder=clip)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        losses = model(training_batch(model))
        (losses.diffusion.mean() + losses.attention.mean()).backward()
        gradients.append([p.grad for p in model.trainable_parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_mask_of_the_wrong_size_is_refused(sd1: Path, clip: Path) -> None:
    model = SubjectDiffusion.from_base(sd1, settings(), image_encoder=clip)
    batch = training_batch(model)
    with pytest.raises(ModelError, match=r"masks is of shape \(3, 3, 4, 8\)"):
        dataclasses.replace(batch, masks=batch.masks[:, :, :4])


def test_a_box_outside_the_image_is_refused(sd1: Path, clip: Path) -> None:
    batch = training_batch(SubjectDiffusion.from_base(sd1, settings(), image_encoder=clip))
    with pytest.raises(ModelError, match="a box reaches out of its image"):
        dataclasses.replace(batch, boxes=batch.boxes * 2)


def test_bands_of_the_draw_train_each_branch_of_the_guidance() -> None:
    draw = torch.tensor([0.0, 0.049, 0.05, 0.099, 0.1, 0.149, 0.15, 1.0])
    text, location, tokens = dropped_conditions(draw, settings())
    assert text.tolist() == [True, True, True, True, False, False, False, False]
    assert location.tolist() == tokens.tolist() == [False, False, True, True, True, True, False, False]
    assert not dropped_conditions(draw, settings(drop_subject_tokens=False))[2].any()


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_training_runs_under_bfloat16_autocast(base: Path, clip: Path, frozen: torch.dtype) -> None:
    torch.manual_seed(0)
    model = SubjectDiffusion.from_base(base, settings(), image_encoder=clip, dtype=frozen)
    exact = SubjectDiffusion.from_base(base, settings(), image_encoder=clip)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(training_batch(model))
    (losses.diffusion.mean() + losses.attention.mean()).backward()
    assert losses.diffusion.dtype == losses.attention.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.trainable_parameters())
    torch.testing.assert_close(losses.diffusion, exact(training_batch(exact)).diffusion, rtol=0.05, atol=0.05)


def test_the_compiler_takes_the_whole_step_as_one_graph(sd1: Path, clip: Path) -> None:
    model = awaken(SubjectDiffusion.from_base(sd1, settings(), image_encoder=clip)).train()
    model.enable_gradient_checkpointing()
    batch = training_batch(model)
    expected = model(batch)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(batch)
    (found.diffusion.mean() + found.attention.mean()).backward()
    torch.testing.assert_close(found.diffusion, expected.diffusion)
    torch.testing.assert_close(found.attention, expected.attention)


def test_the_compiler_takes_each_frozen_encoder_as_one_graph(sd1: Path, clip: Path) -> None:
    model = SubjectDiffusion.from_base(sd1, settings(), image_encoder=clip)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    references = torch.randint(0, 256, (2, 3, 3, CLIP_SIZE, CLIP_SIZE), dtype=torch.uint8)
    present = torch.tensor([[True, True, False], [True, False, False]])
    expected = (model.encode_images(images), *model.encode_references(references, present))
    model.compile(backend="eager", fullgraph=True)
    found = (model.encode_images(images), *model.encode_references(references, present))
    assert model.vae.encoder._compiled_call_impl and model.image_encoder._compiled_call_impl
    assert_same(found, expected)


def test_training_takes_sizes_that_no_level_of_the_unet_divides(base: Path, clip: Path) -> None:
    model = awaken(SubjectDiffusion.from_base(base, settings(attention_downsampling=(1, 2, 4)), image_encoder=clip))
    losses = model(training_batch(model, height=11, width=6))
    (losses.diffusion.mean() + losses.attention.mean()).backward()
    assert losses.diffusion.isfinite().all() and losses.attention.isfinite().all()


@pytest.mark.parametrize(
    "off",
    [
        {"image_cls": False},
        {"adapter": False},
        {"box_embedding": False},
        {"adapter_reach": "boxes"},
        {"adapter_start": "open"},
        {"location_mask": False},
        {"attention_loss": "none"},
        {"attention_loss": "paper"},
        {"attention_tokens": "placeholder"},
    ],
    ids=str,
)
def test_each_ablation_trains(sd1: Path, clip: Path, off: dict[str, object]) -> None:
    model = awaken(SubjectDiffusion.from_base(sd1, settings(**off), image_encoder=clip)).train()
    losses = model(training_batch(model))
    (losses.diffusion.mean() + losses.attention.mean()).backward()
    assert losses.diffusion.isfinite().all() and losses.attention.isfinite().all()
    assert (losses.attention == 0).all() == (model.settings.attention_loss == "none")
