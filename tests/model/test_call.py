"""The pipeline is called as diffusers' StableDiffusionPipeline is."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from PIL import Image

from model import ModelError, Subject, SubjectDiffusion, SubjectDiffusionPipeline
from model.latents import noised
from tests.model.bases import assert_same, awaken, settings

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8))
MUG = Subject(PHOTO, "mug")


@pytest.fixture(scope="module")
def pipe(sd2: Path, clip: Path) -> Any:
    torch.manual_seed(0)
    net = awaken(SubjectDiffusion.from_base(sd2, settings(), image_encoder=clip)).subject_net
    made = SubjectDiffusionPipeline.from_base(sd2, clip, net)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, prompt: Any = "a mug", subjects: Any = MUG, **options: Any) -> torch.Tensor:
    defaults = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(3)}
    found: torch.Tensor = pipe(prompt, subjects, **defaults | options).images
    return found


def test_arguments_are_those_of_stable_diffusion_but_for_ip_adapters() -> None:
    ours, theirs = (
        inspect.signature(kind.__call__).parameters for kind in (SubjectDiffusionPipeline, StableDiffusionPipeline)
    )
    assert {name for name in theirs if "ip_adapter" not in name and name != "kwargs"} <= set(ours)
    for name in ("guidance_scale", "eta", "guidance_rescale", "num_images_per_prompt", "clip_skip", "output_type"):
        assert ours[name].default == theirs[name].default


def _base_alone(pipe: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our base branch (alpha=1), and diffusers' pipeline of the same parts."""
    stock = StableDiffusionPipeline.from_pipe(pipe, safety_checker=None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    given = {"output_type": "latent"} | options
    theirs = stock("a mug", generator=torch.Generator().manual_seed(3), **given).images
    return draw(pipe, alpha=1.0, **options), theirs


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 4, "eta": 0.7},
        {"timesteps": [900, 500, 100], "num_inference_steps": 50},
        {"num_inference_steps": 3, "negative_prompt": "a dog"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_mean_what_they_mean_in_diffusers(pipe: Any, options: dict[str, Any]) -> None:
    if "timesteps" in options:
        pipe = SubjectDiffusionPipeline(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    ours, theirs = _base_alone(pipe, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw(pipe, **options), draw(pipe), atol=1e-3)


def test_sigmas_are_taken_by_schedulers_that_know_them(pipe: Any) -> None:
    pipe = SubjectDiffusionPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    ours, theirs = _base_alone(pipe, sigmas=[10.0, 3.0, 0.5])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_scheduler_that_takes_no_sigmas_says_so(pipe: Any) -> None:
    with pytest.raises(ValueError, match="does not support custom sigmas"):
        draw(pipe, sigmas=[3.0, 1.0])


def test_clip_skip_leaves_out_the_last_layers(pipe: Any) -> None:
    ids = pipe.prompt_tokenizer(["a mug"], [[]]).ids
    encoder = pipe.subject_net.text_encoder
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states
        for skip in (0, 1, 2):
            found, _ = pipe.encode_prompt("a mug", clip_skip=skip)
            torch.testing.assert_close(found, encoder.final_layer_norm(states[-(skip + 1)]))
    assert not torch.allclose(draw(pipe, clip_skip=1), draw(pipe), atol=1e-3)
    assert not torch.allclose(draw(pipe, clip_skip=1, alpha=1.0), draw(pipe, alpha=1.0), atol=1e-3)
    with pytest.raises(ModelError, match="clip_skip=9: the text encoder has 2 layers"):
        draw(pipe, clip_skip=9)


def test_embeddings_stand_in_for_texts(pipe: Any) -> None:
    prompt, negative = pipe.encode_prompt("a mug", MUG, "a dog")
    found = draw(pipe, None, MUG, prompt_embeds=prompt, negative_prompt_embeds=negative, num_images_per_prompt=2)
    torch.testing.assert_close(found, draw(pipe, negative_prompt="a dog", num_images_per_prompt=2))
    assert not torch.allclose(draw(pipe, None, MUG, prompt_embeds=prompt * 0.5), found[:1], atol=1e-3)


def test_the_subjects_scale_runs_from_none_of_their_details_to_all(pipe: Any) -> None:
    images = []
    for scale in (0.0, 0.5, 1.0):
        pipe.set_subject_scale(scale)
        images.append(draw(pipe))
    off, half, on = images
    assert torch.equal(on, draw(pipe))
    assert not torch.allclose(off, half, atol=1e-3) and not torch.allclose(half, on, atol=1e-3)
    calls: list[int] = []
    hook = pipe.subject_net.blocks[0].adapter.register_forward_hook(lambda *_: calls.append(1))
    pipe.set_subject_scale(0.0)
    assert torch.equal(draw(pipe), off) and not calls
    pipe.set_subject_scale(1.0)
    hook.remove()


def test_diffusers_own_kind_of_callback_knows_when_to_act(pipe: Any) -> None:
    seen: list[tuple[int, int]] = []

    class Look(PipelineCallback):  # type: ignore[misc]  # diffusers is untyped
        tensor_inputs = ("latents",)

        def callback_fn(self, running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append((step, running.num_timesteps))
            return tensors

    draw(pipe, callback_on_step_end=Look())
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_a_callback_ends_the_steps_by_interrupt(pipe: Any) -> None:
    seen: list[int] = []

    def stop(running: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        running._interrupt = True
        return tensors

    first = draw(pipe, callback_on_step_end=stop)
    assert seen == [0] and not torch.allclose(first, draw(pipe))


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("output_type", ["np"])
def test_eight_schedulers_draw(pipe: Any, scheduler: str, output_type: str) -> None:
    pipe = SubjectDiffusionPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    found = pipe("a mug", MUG, num_inference_steps=4, output_type=output_type).images
    assert found.shape == (1, 64, 64, 3) and np.isfinite(found).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "a prompt, or prompt_embeds, is needed"),
        ({"prompt_embeds": torch.zeros(1, 77, 24)}, "prompt and prompt_embeds: give one of them"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 5, 24)}, r"\(B, 77, 24\) is needed"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: at least one step"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "'gligen' is unknown here; it takes scale"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "'prompt_embeds' is unknown here"),
        ({"callback_on_step_end": SDCFGCutoffCallback()}, "'prompt_embeds' is unknown here; it takes latents"),
        ({"negative_prompt_embeds": torch.zeros(3, 77, 24)}, "for 3 prompts, but there are 1"),
        ({"prompt": ["a mug", "a mug"]}, "several prompts came with one list of subjects"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
def test_what_does_not_fit_is_one_line(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        draw(pipe, **options)
    assert "\n" not in str(error.value)


def test_no_subjects_or_one_need_no_list(pipe: Any) -> None:
    assert torch.equal(draw(pipe, subjects=None), draw(pipe, subjects=[]))
    assert torch.equal(draw(pipe, subjects=MUG), draw(pipe, subjects=[MUG]))
    assert torch.equal(draw(pipe, ["a mug"], [[MUG]]), draw(pipe, subjects=MUG))
    two = draw(pipe, ["a mug", "a mug"], [None, [MUG]], latents=torch.ones(2, 4, 8, 8))
    assert not torch.allclose(two[0], two[1], atol=1e-3)


def test_two_subjects_of_one_tag_are_two(pipe: Any) -> None:
    other = Subject(PHOTO.rotate(90), "mug")
    both = draw(pipe, "a mug beside a mug", [MUG, other])
    assert not torch.allclose(both, draw(pipe, "a mug beside a mug", [MUG, MUG]), atol=1e-3)


def test_several_references_of_a_subject_enter_as_one(pipe: Any) -> None:
    turned, red = PHOTO.rotate(90), Subject(Image.new("RGB", PHOTO.size, "red"), "robot")
    prompt = "a mug and a robot"
    one = draw(pipe, prompt, [MUG, red])
    assert_same(draw(pipe, prompt, [Subject([PHOTO, PHOTO, PHOTO], "mug"), red]), one)
    both = draw(pipe, prompt, [Subject([PHOTO, turned], "mug"), red])
    assert not torch.allclose(both, one, atol=1e-3)
    assert_same(draw(pipe, prompt, [Subject([turned, PHOTO], "mug", mask=[None, None]), red]), both)
    noise = torch.ones(2, 4, 8, 8)
    mixed = draw(pipe, ["a mug", "a mug"], [[MUG], [Subject([PHOTO, turned], "mug")]], latents=noise)
    assert_same(mixed[:1], draw(pipe, "a mug", MUG, latents=noise[:1]))
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-3)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        ([], None, "the list is empty"),
        ([PHOTO], np.ones((8, 8), bool), "a list of as many masks"),
        ([PHOTO, PHOTO], [None], "a list of as many masks"),
    ],
)
def test_a_list_of_references_that_does_not_fit_is_one_line(image: Any, mask: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Subject(image, "mug", mask=mask)


def test_a_tag_past_the_end_of_a_long_prompt_keeps_its_subject(pipe: Any) -> None:
    prompt = "a table and " * 60 + "a mug"
    assert not torch.allclose(draw(pipe, prompt), draw(pipe, prompt, Subject(PHOTO.rotate(90), "mug")), atol=1e-3)


def test_a_vae_that_overflows_in_half_precision_encodes_in_full(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, noise, seen = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 4, 4, 4), []
    expected = noised(pipe.vae, pipe.scheduler, pixels, noise, torch.tensor([0]))
    encode = type(pipe.vae).encode

    def overflowing(vae: Any, given: torch.Tensor, **options: Any) -> Any:
        seen.append(given.dtype)
        encoded = encode(vae.float(), given.float(), **options)
        vae.to(given.dtype)
        if given.dtype == torch.float16:
            encoded.latent_dist.mean *= torch.inf
        return encoded

    monkeypatch.setattr(type(pipe.vae), "encode", overflowing)
    pipe.vae.half()
    found = noised(pipe.vae, pipe.scheduler, pixels.half(), noise, torch.tensor([0]))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    assert seen == [torch.float16, torch.float32] and pipe.vae.dtype == torch.float16
    pipe.vae.float()


def test_a_vae_that_overflows_in_half_precision_decodes_in_full(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, seen = torch.randn(1, 4, 8, 8), []
    expected = pipe._decode(latents, "pt")
    decode = type(pipe.vae).decode

    def overflowing(vae: Any, scaled: torch.Tensor, **options: Any) -> Any:
        seen.append(scaled.dtype)
        (decoded,) = decode(vae.float(), scaled.float(), **options)
        vae.to(scaled.dtype)
        return (decoded if scaled.dtype == torch.float32 else decoded * torch.inf,)

    monkeypatch.setattr(type(pipe.vae), "decode", overflowing)
    pipe.vae.half()
    torch.testing.assert_close(pipe._decode(latents, "pt"), expected, rtol=0.01, atol=0.01)
    assert seen == [torch.float16, torch.float32] and pipe.vae.dtype == torch.float16
    pipe.vae.float()
