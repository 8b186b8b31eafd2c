"""Captioners of every kind: those that continue a prompt, and those that answer it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
)

from datapipe.backends.chat import CHAT_PROMPT, OBJECTS_PROMPT, bounded
from datapipe.backends.image_to_text import TASK_PROMPTS, ImageToText
from datapipe.backends.loading import ModelSettings
from datapipe.probe import probe_sample
from datapipe.schema import Reason
from datapipe.stages.caption import CaptionSettings
from subject_diffusion.errors import BackendError
from tests.backends import captioners
from tests.backends.captioners import PATCH, SIDE, SPECIAL, TOWER, VISION, template
from toyworld.pretrain.vocabulary import build_tokenizer

IMAGES = [np.random.default_rng(seed).integers(0, 256, (40, 48 + 8 * seed, 3), np.uint8) for seed in range(3)]


def captioner(folder: Path, prompt: str = "", *, most: int = 8 * 28 * 28) -> ImageToText:
    return ImageToText(ModelSettings(model=str(folder)), prompt, 5, 1, min_pixels=28 * 28, max_pixels=most)


def tokenizer_with_images() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def save_random_blip2(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tokenizer_with_images()
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    text = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=64, **sizes, **SPECIAL)
    config = Blip2Config(
        text_config=text.to_dict(),
        vision_config=VISION,
        qformer_config=TOWER | {"vocab_size": 9, "encoder_hidden_size": 32},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)


def save_random_llava(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tokenizer_with_images()
    text = TOWER | SPECIAL | {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=template("<image>"),
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_blip_2_gives_each_image_the_caption_that_it_gets_alone_and_begins_it_with_the_prompt(tmp_path, prompt):
    save_random_blip2(tmp_path)
    caption = captioner(tmp_path, prompt)
    together = caption(IMAGES)
    assert together == [caption([image])[0] for image in IMAGES]
    assert all(c.startswith(prompt) for c in together)


@pytest.mark.parametrize("prompt", ["", "what is it"])
def test_of_a_model_that_chats_the_answer_alone_is_the_caption(tmp_path, prompt):
    save_random_llava(tmp_path)
    caption = captioner(tmp_path, prompt)
    assert (prompt or CHAT_PROMPT) in caption._prompt
    together = caption(IMAGES)
    assert together == [caption([image])[0] for image in IMAGES]
    assert all(c and (prompt or CHAT_PROMPT).lower() not in c for c in together)


def test_a_model_without_a_processor_of_images_is_refused_by_name(tmp_path):
    save_random_blip2(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(BackendError, match=f"{tmp_path.name}"):
        captioner(tmp_path)


CHATTING: dict[str, Callable[[Path], None]] = {
    "gemma3": captioners.save_gemma3,
    "idefics3": captioners.save_idefics3,
    "qwen": captioners.save_qwen,
    "qwen3": captioners.save_qwen3,
    "smolvlm": captioners.save_smolvlm,
}
"""By what they are called; the first SmolVLM is an Idefics 3."""


@pytest.mark.parametrize("name", CHATTING)
def test_chat_models_of_today_caption_a_batch_as_they_caption_each_image_alone(tmp_path, name):
    CHATTING[name](tmp_path)
    caption = captioner(tmp_path)
    together = caption(IMAGES)
    assert all(together)
    assert together == [caption([image])[0] for image in IMAGES]
    assert not any("describe" in c for c in together)


TOLD: dict[str, Callable[[Path], None]] = {
    "paligemma": captioners.save_paligemma,
    "instructblip": captioners.save_instructblip,
    "florence2": captioners.save_florence2,
}


@pytest.mark.parametrize("prompt", ["", "a photo of"])
@pytest.mark.parametrize("kind", TOLD)
def test_what_a_model_is_told_is_no_part_of_its_caption_and_has_a_default(tmp_path, kind, prompt):
    TOLD[kind](tmp_path)
    caption = captioner(tmp_path, prompt)
    assert (prompt or TASK_PROMPTS[kind]) in caption._prompt
    together = caption(IMAGES)
    assert together == [caption([image])[0] for image in IMAGES]
    assert all(c and not c.startswith((prompt or TASK_PROMPTS[kind]).lower().rstrip(".")) for c in together)


def test_only_a_chat_model_is_asked_for_objects(tmp_path):
    save_random_blip2(tmp_path / "blip-2")
    save_random_llava(tmp_path / "llava")
    with pytest.raises(BackendError, match=r"^caption\.model .*blip-2: is no chat model, and cannot list objects"):
        CaptionSettings(model=str(tmp_path / "blip-2"), objects=True).build()
    stage = CaptionSettings(model=str(tmp_path / "llava"), objects=True, max_new_tokens=5).build()
    assert isinstance(stage._caption, ImageToText) and OBJECTS_PROMPT in stage._caption._prompt
    (sample,) = stage([probe_sample()])
    assert sample.verdict and sample.verdict.reason is Reason.NO_ANSWER, "a random model says no JSON"


def test_florence_2_is_not_asked_for_what_it_answers_with_coordinates(tmp_path):
    captioners.save_florence2(tmp_path)
    with pytest.raises(BackendError, match="<OD> with coordinates; captions come from <CAPTION>, <DETAILED_CAPTION>"):
        captioner(tmp_path, "<OD>")
    assert captioner(tmp_path, "<DETAILED_CAPTION>")(IMAGES[:1])


def test_a_large_image_does_not_become_a_long_prompt(tmp_path):
    captioners.save_qwen(tmp_path)
    caption = captioner(tmp_path)
    image = np.zeros((3000, 4000, 3), np.uint8)
    inputs = caption._chat_inputs(caption._turns([image]))
    patches = inputs["image_grid_thw"].prod(1).item()
    assert patches * 14 * 14 <= 8 * 28 * 28
    assert inputs["input_ids"].shape[1] < 40


@pytest.mark.parametrize("size", [(6000, 4000), (4000, 6000), (30, 20), (1, 5), (640, 480), (9000, 1)])
def test_images_are_brought_within_the_bounds_and_keep_their_shape(size):
    least, most = 10_000, 1_000_000
    image = bounded(Image.new("RGB", size), least, most)
    assert least <= image.width * image.height <= most or 1 in size
    if 1 not in size:
        assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.02)
    assert (image.size == size) == (least <= size[0] * size[1] <= most)
