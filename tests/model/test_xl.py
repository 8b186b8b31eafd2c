"""Stable Diffusion XL as a base: two text encoders, time ids, several transformer blocks at a place."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from model import ModelError, Subject, SubjectDiffusion, SubjectDiffusionPipeline
from model.base import Base, load_base
from model.subject_net import SubjectNet, block_configs
from model.unet import admit_subjects
from tests.model.bases import assert_same, awaken, settings, training_batch

MUG = Subject(Image.new("RGB", (32, 32), "red"), "mug")


@pytest.fixture(scope="module")
def untrained(sdxl: Path, clip: Path) -> SubjectDiffusion:
    torch.manual_seed(0)
    return SubjectDiffusion.from_base(sdxl, settings(attention_downsampling=(2, 4)), image_encoder=clip)


@pytest.fixture(scope="module")
def awake(untrained: SubjectDiffusion) -> SubjectDiffusion:
    return awaken(copy.deepcopy(untrained))


@pytest.fixture
def pipe(awake: SubjectDiffusion, sdxl: Path, clip: Path) -> Any:
    return _quiet(SubjectDiffusionPipeline.from_base(sdxl, clip, copy.deepcopy(awake.subject_net)))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe: Any, prompt: Any = "a red mug", **options: Any) -> Tensor:
    fixed = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(3)}
    images: Tensor = pipe(prompt, **fixed | options).images
    return images


@pytest.mark.parametrize(("size", "negative"), [((64, 64), None), ((40, 72), "a dog")])
def test_untrained_it_draws_what_its_base_draws(
    untrained: SubjectDiffusion, sdxl: Path, clip: Path, size: tuple[int, int], negative: str | None
) -> None:
    pipe = _quiet(SubjectDiffusionPipeline.from_base(sdxl, clip, untrained.subject_net))
    stock = _quiet(StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False))
    options: dict[str, Any] = {"height": size[0], "width": size[1], "negative_prompt": negative, "guidance_scale": 5.0}
    theirs = _draw(stock, **options)
    ours = _draw(pipe, **options, subject_guidance_scale=5.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_draw(pipe, **options, alpha=1.0), theirs, rtol=1e-4, atol=1e-4)
    assert_same(_draw(_quiet(pipe.base()), **options), theirs)


def test_a_subject_is_a_word_to_both_encoders_and_part_of_the_pooled_text(pipe: Any) -> None:
    written = pipe.prompt_tokenizer(["a mug", "a mug"], [["mug"], []])
    seen = torch.randn(2, 2, 1, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (pipe.subject_net.encode_prompt(written.ids, written.placeholders, image) for image in seen)
    change = (one.states - other.states).abs()
    place = written.placeholders[0, 0]
    assert not change[0, :place].any() and (change[0, place] > 0).all(), "in all 16 + 24 channels"
    assert not torch.equal(one.pooled[0], other.pooled[0])
    assert not change[1].any() and torch.equal(one.pooled[1], other.pooled[1])


@pytest.mark.parametrize("skip", [0, 1])
def test_a_prompt_without_subjects_is_encoded_as_diffusers_does(
    untrained: SubjectDiffusion, sdxl: Path, skip: int
) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    text, _, pooled, _ = stock.encode_prompt("a big toy robot", clip_skip=skip, do_classifier_free_guidance=False)
    ids = untrained.prompt_tokenizer(["a big toy robot", ""], [[], []])
    with torch.no_grad():
        found = untrained.subject_net.encode_prompt(ids.ids, ids.placeholders, torch.zeros(2, 1, 12), skip)
    assert_same(found.states[:1], text)
    assert_same(found.pooled[:1], pooled)
    assert not found.states[1].any() and not found.pooled[1].any(), "an empty prompt is zeros"


def test_every_trainable_parameter_learns_but_what_is_never_read(awake: SubjectDiffusion) -> None:
    model = copy.deepcopy(awake).train()
    losses = model(training_batch(model))
    (losses.diffusion + losses.attention).mean().backward()
    assert (losses.attention[:2] != 0).all()
    without = {n for n, p in model.subject_net.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {n for n, p in model.subject_net.named_parameters() if not p.requires_grad}
    assert all(n.startswith(("text_encoder.encoder.layers.1.", "text_encoder.final_layer_norm.")) for n in without)
    assert len(without) == 18


def test_sizes_and_crops_reach_the_unet(untrained: SubjectDiffusion) -> None:
    batch = training_batch(untrained)
    with torch.no_grad():
        before = untrained(batch).diffusion
        batch.time_ids[0, 2] = 50
        after = untrained(batch).diffusion
    assert before[0] != after[0] and torch.equal(before[1:], after[1:])


def test_the_first_block_of_a_place_has_the_adapter_and_all_have_keys(untrained: SubjectDiffusion) -> None:
    blocks = untrained.subject_net.blocks
    assert len(blocks) == 1 * 3 + 3 * 4 and sum(block.adapter is not None for block in blocks) == 7


def test_the_vae_stays_float32_where_the_base_asks_for_that(sdxl: Path, clip: Path) -> None:
    model = SubjectDiffusion.from_base(sdxl, settings(attention_downsampling=(2, 4)), clip, torch.bfloat16)
    assert (model.vae.dtype, model.unet.dtype, model.image_encoder.dtype) == (torch.float32, *[torch.bfloat16] * 2)
    pixels, pipe = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), SubjectDiffusionPipeline.from_model(model)
    outside = model.encode_images(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_images(pixels), outside), "as of held-out images"
        assert model(training_batch(model)).diffusion.isfinite().all()
        drawn = _draw(_quiet(pipe), "a mug", subjects=MUG)
    assert drawn.dtype == torch.float32 and drawn.isfinite().all()
    with pytest.raises(ModelError, match="the base alone needs all of its text encoders"):
        pipe.base()


def test_a_folder_is_saved_and_read_here_and_by_diffusers_with_the_code_it_carries(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "pipeline")
    expected = _draw(pipe, subjects=MUG)
    assert_same(_draw(_quiet(SubjectDiffusionPipeline.from_pretrained(tmp_path / "pipeline")), subjects=MUG), expected)
    assert not torch.allclose(_draw(pipe), expected, atol=1e-3)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    carried = _quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True))
    assert type(carried).__module__.startswith("diffusers_modules."), "not this project's class"
    assert_same(_draw(carried, subjects=carried.make_subject(MUG.image, "mug")), expected)
    # Its parts are the base's, which can be started from again.
    assert load_base(tmp_path / "pipeline").force_zeros_for_empty_prompt is True


def test_what_was_learned_moves_to_another_base(pipe: Any, sdxl: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sdxl, tmp_path / "other"))
    encoder = load_base(sdxl).text_encoder_2
    with torch.no_grad():
        encoder.text_projection.weight += 0.5
    encoder.save_pretrained(other / "text_encoder_2")
    moved = pipe.with_base(other).subject_net.text_encoder_2.text_projection.weight
    assert_same(moved, pipe.subject_net.text_encoder_2.text_projection.weight + 0.5)


def test_what_has_no_place_here_is_refused_in_one_line(pipe: Any) -> None:
    for call in (
        lambda: pipe.load_lora_weights("lora"),
        lambda: pipe.load_textual_inversion("word"),
        lambda: pipe.encode_prompt("a mug"),
        lambda: _draw(pipe, None, prompt_embeds=torch.zeros(1, 77, 40)),
    ):
        with pytest.raises(ModelError, match="Stable Diffusion XL has two: not supported here"):
            call()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"text_encoder": [None, None]},
            "not its refiner, is needed, with text_encoder of class CLIPTextModel, not none",
        ),
        ({"text_encoder_2": None}, "with text_encoder_2 of class CLIPTextModelWithProjection, not none"),
        ({"text_encoder_2": ["transformers", "T5EncoderModel"]}, "with text_encoder_2 .*, not T5EncoderModel"),
    ],
)
def test_a_refiner_or_half_a_base_is_refused_before_weights_are_read(
    changed: dict[str, Any], said: str, sdxl: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(sdxl, tmp_path / "base"))
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    index = json.loads((base / "model_index.json").read_text()) | changed
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=said) as error:
        load_base(base)
    assert "\n" not in str(error.value)


def _other_pooled_text(base: Base) -> Any:
    base.text_encoder_2.config.projection_dim = 28
    return CLIPTextModelWithProjection(base.text_encoder_2.config)


def _normalized_latents(base: Base) -> Any:
    base.vae.register_to_config(latents_mean=[0.0] * 4)
    return base.vae


def _another_word(base: Base) -> Any:
    base.tokenizer_2.add_tokens("teapot")
    return base.tokenizer_2


@pytest.mark.parametrize(
    ("part", "changed", "said"),
    [
        ("text_encoder_2", _other_pooled_text, "28 wide, and 6 numbers of size and crop; .* not its refiner"),
        ("vae", _normalized_latents, "its latents have a mean and deviation of their own"),
        ("tokenizer_2", _another_word, "its two tokenizers have different vocabularies"),
    ],
    ids=["pooled text", "latents", "vocabulary"],
)
def test_what_would_be_read_wrongly_is_refused(part: str, changed: Any, said: str, sdxl: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(sdxl, tmp_path / "base"))
    torch.manual_seed(0)
    changed(load_base(sdxl)).save_pretrained(base / part)
    with pytest.raises(ModelError, match=said):
        load_base(base)


def test_at_full_size_the_adapters_are_as_large_as_on_stable_diffusion_2() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        admit_subjects(unet)
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        second = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        net = SubjectNet(
            settings=settings(max_subjects=2).model_dump(mode="json"),
            text_config=text | {"vocab_size": 49408},
            block_configs=block_configs(unet),
            latent_channels=4,
            stem_channels=320,
            image_width=1024,
            patch_width=1280,
            second_text_config=second | {"vocab_size": 49408, "projection_dim": 1280},
            second_tokens={"end": 49407, "pad": 0, "zero_empty": True},
        )

    def millions(*modules: torch.nn.Module | None) -> float:
        return round(sum(p.numel() for module in modules if module for p in module.parameters()) / 1e6, 1)

    assert millions(unet) == 2567.5
    assert len(net.blocks) == 70 and sum(block.adapter is not None for block in net.blocks) == 11
    assert millions(*(block.adapter for block in net.blocks)) == 212.5
    assert millions(*(layer for block in net.blocks for layer in (block.to_k, block.to_v))) == 340.8
    assert millions(*net.text_encoders) == 817.7
    assert millions(net) == 1382.3
