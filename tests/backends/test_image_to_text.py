"""Captioners of every kind: those that continue a prompt, and those that answer it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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

from datapipe.backends.image_to_text import CHAT_PROMPT, ImageToText
from datapipe.backends.loading import ModelSettings
from datapipe.errors import BackendError
from toyworld.pretrain.vocabulary import build_tokenizer

IMAGES = [np.random.default_rng(seed).integers(0, 256, (40, 48 + 8 * seed, 3), np.uint8) for seed in range(3)]
SIDE, PATCH = 32, 16
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": SIDE, "patch_size": PATCH}
SPECIAL = {"bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}


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
    template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %} {{ c.text }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ?{% endif %}"
    )
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_blip_2_gives_each_image_the_caption_that_it_gets_alone_and_begins_it_with_the_prompt(tmp_path, prompt):
    save_random_blip2(tmp_path)
    caption = ImageToText(ModelSettings(model=str(tmp_path)), prompt, 5, 1)
    together = caption(IMAGES)
    assert together == [caption([image])[0] for image in IMAGES]
    assert all(c.startswith(prompt) for c in together)


@pytest.mark.parametrize("prompt", ["", "what is it"])
def test_of_a_model_that_chats_the_answer_alone_is_the_caption(tmp_path, prompt):
    save_random_llava(tmp_path)
    caption = ImageToText(ModelSettings(model=str(tmp_path)), prompt, 5, 1)
    assert (prompt or CHAT_PROMPT) in caption._prompt
    together = caption(IMAGES)
    assert together == [caption([image])[0] for image in IMAGES]
    assert all(c and (prompt or CHAT_PROMPT).lower() not in c for c in together)


def test_a_model_without_a_processor_of_images_is_refused_by_name(tmp_path):
    save_random_blip2(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(BackendError, match=f"{tmp_path.name}"):
        ImageToText(ModelSettings(model=str(tmp_path)), "", 5, 1)
