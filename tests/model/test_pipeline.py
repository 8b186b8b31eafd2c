"""Sampling through the pipeline."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from model import ModelError, Subject, SubjectDiffusion, SubjectDiffusionPipeline, SubjectNet
from model.guidance import guide
from model.location import location_mask
from model.reference import encode_references
from model.subject import stack_subjects
from tests.model.bases import CLIP_PATCHES, CLIP_SIZE, assert_same, awaken, settings, write_base, write_clip


def _photo(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SUBJECTS = [Subject(_photo(0), "red mug"), Subject(_photo(1), "dog", box=(0.5, 0.0, 1.0, 0.9))]
PROMPT = "a red mug and a dog"


@pytest.fixture(scope="module")
def net(sd2: Path, clip: Path) -> SubjectNet:
    torch.manual_seed(0)
    return awaken(SubjectDiffusion.from_base(sd2, settings(), image_encoder=clip)).subject_net


@pytest.fixture
def pipe(sd2: Path, clip: Path, net: SubjectNet) -> SubjectDiffusionPipeline:
    made: SubjectDiffusionPipeline = _quiet(SubjectDiffusionPipeline.from_base(sd2, clip, copy.deepcopy(net)))
    return made


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe: Any, prompt: Any = PROMPT, subjects: Any = SUBJECTS, **options: Any) -> Any:
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(3)} | options
    return pipe(prompt, subjects, **options).images


def test_a_saved_pipeline_draws_the_same_images(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    assert_same(_draw(_quiet(SubjectDiffusionPipeline.from_pretrained(tmp_path))), _draw(pipe))
    assert (tmp_path / "subject_net" / "diffusion_pytorch_model.safetensors").is_file()
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"][1] == "SubjectDiffusionPipeline"


def test_a_saved_pipeline_holds_its_base_as_it_was(pipe: Any, sd2: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    for part, kind in {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}.items():
        ours, theirs = (kind.from_pretrained(f, subfolder=part).state_dict() for f in (tmp_path, sd2))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_trained_can_be_saved_alone_and_put_on_its_base_again(
    pipe: Any, sd2: Path, clip: Path, tmp_path: Path
) -> None:
    pipe.subject_net.save_pretrained(tmp_path)
    again = _quiet(SubjectDiffusionPipeline.from_base(sd2, clip, tmp_path))
    assert_same(_draw(again), _draw(pipe))


def test_on_another_base_what_was_learned_is_added_to_its_weights(
    pipe: Any, sd2: Path, clip: Path, tmp_path: Path
) -> None:
    other = _community_checkpoint(sd2, tmp_path / "other")
    with pytest.raises(ModelError, match=r"trained on another one; .* call its with_base"):
        SubjectDiffusionPipeline.from_base(other, clip, pipe.subject_net)
    moved = _quiet(pipe.with_base(other))
    expected, found = (_learned(*on, clip) for on in ((pipe, sd2), (moved, other)))
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_draw(moved), _draw(pipe), atol=1e-3)
    moved.save_pretrained(tmp_path / "moved")
    assert_same(_draw(_quiet(SubjectDiffusionPipeline.from_pretrained(tmp_path / "moved"))), _draw(moved))
    # diffusers' own way to put parts in is warned of.
    with pytest.warns(UserWarning, match="subject_net was trained on another base"):
        SubjectDiffusionPipeline.from_pretrained(tmp_path / "moved", unet=pipe.unet)


def _learned(pipe: Any, base: Path, clip: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    untrained = SubjectDiffusion.from_base(base, settings(), image_encoder=clip).subject_net.state_dict()
    return {name: weights - untrained[name] for name, weights in pipe.subject_net.state_dict().items()}


def _community_checkpoint(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    for part, kind in {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}.items():
        model = kind.from_pretrained(base, subfolder=part)
        with torch.no_grad():
            for weights in model.parameters():
                weights += 0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(weights.numel()))
        model.save_pretrained(folder / part)
    return folder


def test_a_model_in_training_can_be_sampled_and_saved(sd1: Path, clip: Path, tmp_path: Path) -> None:
    model = awaken(SubjectDiffusion.from_base(sd1, settings(), image_encoder=clip))
    pipe = _quiet(SubjectDiffusionPipeline.from_model(model))
    pipe.save_pretrained(tmp_path)
    assert_same(_draw(_quiet(SubjectDiffusionPipeline.from_pretrained(tmp_path))), _draw(pipe))
    with pytest.raises(ModelError, match="text encoder"):
        _draw(pipe, alpha=0.5)


def test_a_model_with_frozen_parts_in_bfloat16_can_be_sampled_under_autocast(sd1: Path, clip: Path) -> None:
    model = SubjectDiffusion.from_base(sd1, settings(), image_encoder=clip, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert _draw(_quiet(SubjectDiffusionPipeline.from_model(awaken(model)))).isfinite().all()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_untrained_it_draws_what_its_base_draws(base: Path, clip: Path, rescale: float) -> None:
    model = SubjectDiffusion.from_base(base, settings(), image_encoder=clip)
    pipe = _quiet(SubjectDiffusionPipeline.from_base(base, clip, model.subject_net))
    stock = _quiet(StableDiffusionPipeline.from_pretrained(base, safety_checker=None))
    # With s_i = s_t, and nobody to draw, the image branch leaves the formula: what is left is the base's guidance.
    scales = {"guidance_scale": 5.0, "guidance_rescale": rescale}
    ours = _draw(pipe, "a red mug", [], **scales, subject_guidance_scale=5.0)
    theirs = stock(
        "a red mug",
        num_inference_steps=3,
        **scales,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_guidance_is_the_formula_over_three_separate_predictions(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def slow(full: Tensor, image: Tensor, nothing: Tensor, s_t: float, s_i: Tensor) -> Tensor:
        seen.update(full=full, image=image, nothing=nothing, s_t=s_t, s_i=s_i)
        out = torch.empty_like(full)
        for place in np.ndindex(*full.shape):
            u, f, m = float(nothing[place]), float(full[place]), float(image[place])
            out[place] = u + s_t * (f - m) + float(s_i) * (m - u)
        torch.testing.assert_close(guide(full, image, nothing, s_t, s_i), out)
        return out

    monkeypatch.setattr("model.prediction.guide", slow)
    _draw(pipe, guidance_scale=6.0, subject_guidance_scale=2.0, num_inference_steps=1, height=32, width=32)
    assert (seen["s_t"], seen["s_i"]) == (6.0, 2.0)
    assert not torch.equal(seen["full"], seen["image"]) and not torch.equal(seen["image"], seen["nothing"])
    full_alone = {}
    step = type(pipe.scheduler).step

    def spy(self: Any, prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        full_alone["prediction"] = prediction
        return step(self, prediction, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", spy)
    _draw(pipe, guidance_scale=1, subject_guidance_scale=1, num_inference_steps=1, height=32, width=32)
    torch.testing.assert_close(full_alone["prediction"], seen["full"], rtol=1e-4, atol=1e-5)


def _as_written_out(pipe: Any, subjects: Any, s_t: float, s_i: float, steps: int = 3) -> Tensor:
    """Latents of the plain computation: three branches one by one, all slots, everything anew at every step."""
    net, slots = pipe.subject_net, pipe.subject_net.max_subjects
    references, boxes, shares = stack_subjects([subjects], (64, 64), CLIP_SIZE, "white")
    references, present = references[:, :, 0], shares[..., 0] > 0
    processor = pipe.feature_extractor
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipe.scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            classes, patches = encode_references(pipe.image_encoder, references, present, mean, std)
            text, negative = (
                net.encode_prompt(written.ids, written.placeholders, classes)
                for written in (
                    pipe.prompt_tokenizer([PROMPT], [[s.tag for s in subjects]]),
                    pipe.prompt_tokenizer([""], [[]]),
                )
            )
            seen, unseen = (net.encode_subjects(patches, boxes, p) for p in (present, present & False))
            assert seen.shape[1] == slots * CLIP_PATCHES
            place = location_mask(boxes, present, 8, 8)
            inside, nowhere = (net.cells_reached(boxes, p, (8, 8)) for p in (present, present & False))
            full, image, nothing = (
                net.denoise(pipe.unet, latents, t, *conditions, cells=cells)[0]
                for *conditions, cells in (
                    (text, seen, place, inside),
                    (negative, seen, place, inside),
                    (negative, unseen, place * 0, nowhere),
                )
            )
            guided = nothing + s_t * (full - image) + s_i * (image - nothing)
            latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize(("s_t", "s_i", "branches"), [(6, 2, 3), (3, 3, 2), (5, 1, 2), (1, 1, 1), (1, 3, 3)])
def test_what_is_left_out_of_sampling_changes_nothing(
    pipe: Any, count: int, s_t: float, s_i: float, branches: int
) -> None:
    subjects = [*SUBJECTS, SUBJECTS[0]][:count]
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = _draw(pipe, subjects=subjects, guidance_scale=s_t, subject_guidance_scale=s_i, output_type="latent")
    if not subjects:  # There is nothing that a scale of subjects could scale.
        s_i, branches = 1, 1 if s_t == 1 else 2
    assert set(sizes) == {branches}
    torch.testing.assert_close(found, _as_written_out(pipe, subjects, s_t, s_i), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_subjects_that_reach_their_boxes_alone_are_drawn_by_the_formula_too(sd2: Path, clip: Path, count: int) -> None:
    model = SubjectDiffusion.from_base(sd2, settings(adapter_reach="boxes"), image_encoder=clip)
    pipe = _quiet(SubjectDiffusionPipeline.from_model(awaken(model)))
    subjects = [*SUBJECTS, SUBJECTS[0]][:count]
    found = _draw(pipe, subjects=subjects, guidance_scale=6, subject_guidance_scale=2, output_type="latent")
    torch.testing.assert_close(found, _as_written_out(pipe, subjects, 6, 2), rtol=1e-4, atol=1e-4)


def test_absent_subjects_have_no_keys_in_any_attention(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = set()
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.add((query.shape[2], key.shape[2] - query.shape[2]))
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr("model.adapter.functional.scaled_dot_product_attention", spy)
    added = {}
    for count in range(4):
        lengths.clear()
        _draw(pipe, subjects=[*SUBJECTS, SUBJECTS[0]][:count])
        added[count] = sorted(n for visual, n in lengths if visual == 64 and n > 0)
    one = CLIP_PATCHES
    assert added == {0: [1, 13], 1: [1, 13, one + 1], 2: [1, 13, 2 * one + 1], 3: [1, 13, 3 * one]}


def test_keys_and_values_are_computed_once(pipe: Any) -> None:
    calls: dict[str, int] = {}
    once = ("linear", "to_k", "to_v")
    for name, module in pipe.subject_net.blocks.named_modules():
        if name.endswith(once) and "attn" not in name:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    _draw(pipe, num_inference_steps=4)
    assert set(calls.values()) == {1, 2}  # the adapter's, for rows with subjects and for rows without
    assert {n for n, times in calls.items() if times == 2} == {n for n in calls if n.endswith("linear")}


@pytest.mark.parametrize(
    "other",
    [
        [Subject(_photo(5), "red mug"), SUBJECTS[1]],
        [Subject(SUBJECTS[0].image, "red mug", box=(0.0, 0.0, 0.3, 0.3)), SUBJECTS[1]],
        SUBJECTS[:1],
    ],
    ids=["reference", "box", "number"],
)
def test_the_image_follows_the_subjects(pipe: Any, other: list[Subject]) -> None:
    assert not torch.allclose(_draw(pipe), _draw(pipe, subjects=other), atol=1e-3)


def test_images_of_several_prompts_are_those_of_each_alone(pipe: Any) -> None:
    noise = torch.randn(4, 4, 8, 8)
    prompts, cast = [PROMPT, "a toy"], [SUBJECTS, []]
    together = _draw(pipe, prompts, cast, num_images_per_prompt=2, latents=noise)
    for b in range(2):
        alone = _draw(pipe, prompts[b], cast[b], num_images_per_prompt=2, latents=noise[2 * b : 2 * b + 2])
        torch.testing.assert_close(together[2 * b : 2 * b + 2], alone, rtol=1e-3, atol=1e-3)


def test_sizes_need_not_be_square(pipe: Any) -> None:
    assert _draw(pipe, height=40, width=72).shape == (1, 3, 40, 72)
    assert _draw(pipe, height=40, width=72, output_type="pil")[0].size == (72, 40)


def test_interpolation_runs_from_the_subject_model_to_the_base_alone(pipe: Any, sd2: Path) -> None:
    stock = _quiet(StableDiffusionPipeline.from_pretrained(sd2, safety_checker=None))
    theirs = stock(
        PROMPT,
        num_inference_steps=3,
        guidance_scale=7.5,
        guidance_rescale=0.7,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    torch.testing.assert_close(_draw(pipe, alpha=1.0, guidance_rescale=0.7), theirs, rtol=1e-4, atol=1e-4)
    ends = [theirs, _draw(pipe)]
    for way in ("blend", "switch"):
        torch.testing.assert_close(_draw(pipe, alpha=1.0, guidance_rescale=0.7, interpolation=way), theirs)
        ends.append(_draw(pipe, alpha=0.5, interpolation=way))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(ends, 2))
    near = _draw(pipe, alpha=0.001)
    torch.testing.assert_close(near, ends[1], rtol=0, atol=0.02)


def test_editing_keeps_more_of_the_image_the_weaker_it_is(base: Path, clip: Path) -> None:
    model = awaken(SubjectDiffusion.from_base(base, settings(), image_encoder=clip))
    pipe = _quiet(SubjectDiffusionPipeline.from_base(base, clip, model.subject_net))
    photo = _photo(9).resize((64, 32))
    options = {"image": photo, "num_inference_steps": 10, "output_type": "latent"}
    weak, strong = (_draw(pipe, strength=s, **options) for s in (0.1, 1.0))
    assert weak.shape == (1, 4, 4, 8)
    kept = model.encode_images(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None])
    assert (weak - kept).square().mean() < (strong - kept).square().mean()


def test_conditions_are_computed_once_a_run(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"clip": 0, "text": 0}
    pipe.image_encoder.register_forward_hook(lambda *_: calls.update(clip=calls["clip"] + 1))
    pipe.subject_net.text_encoder.final_layer_norm.register_forward_hook(
        lambda *_: calls.update(text=calls["text"] + 1)
    )
    _draw(pipe, num_inference_steps=5)
    assert calls == {"clip": 1, "text": 2}


def test_a_callback_sees_and_changes_every_step(pipe: Any) -> None:
    steps = []

    def zero(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = _draw(pipe, callback_on_step_end=zero, output_type="latent")
    assert [s for s, _ in steps] == [0, 1, 2] and (latents == 0).all()


def test_a_callback_may_only_look_on(pipe: Any) -> None:
    assert torch.equal(_draw(pipe, callback_on_step_end=lambda *_: None), _draw(pipe))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"generator": [torch.Generator()], "num_images_per_prompt": 2}, "1 generators for 2 images: give one, or"),
        ({"output_type": "numpy"}, "output_type='numpy': give one of pil, np, pt, latent"),
    ],
)
def test_what_diffusers_would_not_take_is_a_value_error_in_one_sentence(pipe: Any, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _draw(pipe, **options)


def test_it_samples_in_bfloat16(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    narrow = _quiet(SubjectDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert {p.dtype for p in narrow.subject_net.parameters()} == {torch.bfloat16}
    assert _draw(narrow, output_type="pil", alpha=0.5)[0].size == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a red mugs and a dog"}, "does not contain its subject's tag 'red mug'"),
        ({"subjects": [SUBJECTS[1]] * 4}, "max_subjects=3"),
        ({"height": 60}, "multiples of 8"),
        ({"subjects": [Subject(_photo(0), "dog", mask=np.ones((4, 4), bool))]}, "must be the same size"),
        ({"subjects": [Subject(_photo(0), "dog", box=(0, 0, 2, 1))]}, "lies not inside the image"),
        ({"prompt": ["a dog", "a mug"], "subjects": [[]]}, "2 prompts, but lists of subjects for 1"),
        ({"prompt": ["a dog", "a mug"], "subjects": [SUBJECTS[1]]}, "give one list a prompt"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"strength": 0.0}, "strength=0"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"interpolation": "jump"}, "interpolation: 'jump' is unknown here; it takes blend, switch"),
        ({"guidance_rescale": 2.0}, "guidance_rescale=2"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, "latents are of shape"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_bad_input_is_one_clear_line(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        _draw(pipe, **options)
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_no_such_pipeline_is_one_clear_line(sd2: Path, tmp_path: Path) -> None:
    for folder, message in [(sd2, "subject_net"), (tmp_path, "model_index.json"), (tmp_path / "no", "no such folder")]:
        with pytest.raises(ModelError, match=f"^pipeline {folder}: .*{message}") as raised:
            SubjectDiffusionPipeline.from_pretrained(folder)
        assert "\n" not in str(raised.value)


def test_a_base_of_the_wrong_kind_is_named(sd2: Path, clip: Path, tmp_path: Path) -> None:
    make = SubjectDiffusion.from_base
    with pytest.raises(ModelError, match=r"no model_index.json"):
        make(tmp_path, settings(), image_encoder=clip)
    with pytest.raises(ModelError, match=r"image encoder .*: no config.json"):
        make(sd2, settings(), image_encoder=tmp_path)
    with pytest.raises(ModelError, match="a CLIP model is needed, not 'clip_text_model'"):
        make(sd2, settings(), image_encoder=sd2 / "text_encoder")
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "FluxTransformer2DModel"]}))
    with pytest.raises(ModelError, match="unet of class UNet2DConditionModel, not FluxTransformer2DModel"):
        make(tmp_path, settings(), image_encoder=clip)
    with pytest.raises(ModelError, match=r"the base's UNet has attention at \[1, 2, 4\] only"):
        make(sd2, settings(attention_downsampling=(16,)), image_encoder=clip)


def test_a_net_of_another_base_or_encoder_is_refused(net: SubjectNet, sd1: Path, sd2: Path, clip: Path) -> None:
    with pytest.raises(ModelError, match="another base"):
        SubjectDiffusionPipeline.from_base(sd1, clip, net)
    with pytest.raises(ModelError, match="not a folder of SubjectNet"):
        SubjectDiffusionPipeline.from_base(sd2, clip, sd2 / "vae")


@pytest.mark.parametrize("weights", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_base_cut_short_is_refused_in_one_line(weights: str, clip: Path, tmp_path: Path) -> None:
    file = write_base(tmp_path / "base", "sd1") / weights
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="base ") as error:
        SubjectDiffusion.from_base(tmp_path / "base", settings(), image_encoder=clip)
    assert "\n" not in str(error.value)


def test_the_vision_half_of_a_clip_alone_will_do(sd1: Path, tmp_path: Path) -> None:
    half = write_clip(tmp_path / "half", whole=False)
    model = awaken(SubjectDiffusion.from_base(sd1, settings(), image_encoder=half))
    assert _draw(_quiet(SubjectDiffusionPipeline.from_model(model))).isfinite().all()
