"""Captioners of today, tiny and random, in hub format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BlipImageProcessor,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from toyworld.pretrain.vocabulary import build_tokenizer

SIDE, PATCH = 32, 16
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": SIDE, "patch_size": PATCH}
SPECIAL = {"bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}
TEXT = TOWER | SPECIAL | {"max_position_embeddings": 512, "num_key_value_heads": 2}


def tokenizer_with(**special: str) -> Any:
    """The toy tokenizer with more special tokens, each an attribute of it as in the published ones."""
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer,
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        extra_special_tokens=special,
        model_input_names=["input_ids", "attention_mask"],
    )


def save(model: PreTrainedModel, folder: Path, seed: int = 0) -> None:
    """With weights large enough that what is said depends on the image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)


def template(image: str) -> str:
    """A chat template in which `image` stands for an image."""
    return (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
        + image
        + "{% else %} {{ c.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ?{% endif %}"
    )


def save_gemma3(folder: Path) -> None:
    tokenizer = tokenizer_with(image_token="<soft>", boi_token="<start>", eoi_token="<end>")
    ids = {f"{name}_token_index": getattr(tokenizer, f"{name}_token_id") for name in ("image", "boi", "eoi")}
    text = TEXT | {"vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **ids)
    save(Gemma3ForConditionalGeneration(config), folder, seed=3)
    images = Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    Gemma3Processor(images, tokenizer, chat_template=template("{{ '<start>' }}"), image_seq_length=4).save_pretrained(
        folder
    )


def save_idefics3(folder: Path) -> None:
    """The class of the first SmolVLM."""
    tokenizer = tokenizer_with(
        image_token="<image>", fake_image_token="<fake>", global_image_token="<global>", end_of_utterance_token="<eou>"
    )
    side = {"longest_edge": SIDE}
    images = Idefics3ImageProcessor(size=side, max_image_size=side, do_image_splitting=False)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template("<image>"))
    config = Idefics3Config(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(processor.tokenizer)},
        vision_config=VISION,
        image_token_id=processor.image_token_id,
        scale_factor=1,
    )
    save(Idefics3ForConditionalGeneration(config), folder)
    processor.save_pretrained(folder)


def save_smolvlm(folder: Path) -> None:
    tokenizer = tokenizer_with(
        image_token="<image>", fake_image_token="<fake>", global_image_token="<global>", end_of_utterance_token="<eou>"
    )
    config = SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config=VISION,
        image_token_id=tokenizer.image_token_id,
        scale_factor=1,
    )
    save(SmolVLMForConditionalGeneration(config), folder)
    side = {"longest_edge": SIDE}
    images = SmolVLMImageProcessor(size=side, max_image_size=side, do_image_splitting=False)
    videos = SmolVLMVideoProcessor(size=side, max_image_size=side)
    SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, chat_template=template("<image>")).save_pretrained(
        folder
    )


def save_qwen(folder: Path) -> None:
    tokenizer = tokenizer_with(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    names = ("image", "video", "vision_start", "vision_end")
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope, "max_position_embeddings": 4096},
        vision_config=vision | {"fullatt_block_indexes": [1]},
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names},
    )
    save(Qwen2_5_VLForConditionalGeneration(config), folder)
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=template(shown)
    ).save_pretrained(folder)


def save_qwen3(folder: Path) -> None:
    tokenizer = tokenizer_with(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    vision = TOWER | {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": 16, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    config = Qwen3VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope, "head_dim": 16},
        vision_config=vision | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("image", "video")},
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("vision_start", "vision_end")},
    )
    save(Qwen3VLForConditionalGeneration(config), folder)
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16), tokenizer, Qwen3VLVideoProcessor(), chat_template=template(shown)
    ).save_pretrained(folder)


def save_paligemma(folder: Path) -> None:
    images = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(images, tokenizer_with(image_token="<image>"))
    vocabulary = len(processor.tokenizer)
    config = PaliGemmaConfig(
        vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        text_config=TEXT | {"model_type": "gemma", "vocab_size": vocabulary, "head_dim": 16},
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
        vocab_size=vocabulary,
    )
    save(PaliGemmaForConditionalGeneration(config), folder)
    processor.save_pretrained(folder)


def save_instructblip(folder: Path) -> None:
    tokenizer = tokenizer_with()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    text = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=64, **sizes, **SPECIAL)
    config = InstructBlipConfig(
        text_config=text.to_dict(),
        vision_config=VISION,
        qformer_config=TOWER | {"vocab_size": len(tokenizer), "encoder_hidden_size": 32},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save(InstructBlipForConditionalGeneration(config), folder)
    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    InstructBlipProcessor(images, tokenizer, build_tokenizer(), num_query_tokens=4).save_pretrained(folder)


def save_florence2(folder: Path) -> None:
    tokenizer = tokenizer_with(image_token="<image>")
    images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    images.image_seq_length = 2
    processor = Florence2Processor(images, tokenizer)
    text = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
        decoder_start_token_id=102, forced_eos_token_id=102, **SPECIAL,
    )  # fmt: skip
    vision = {"depths": [1, 1, 1, 1], "embed_dim": [8, 16, 16, 32], "num_heads": [1, 2, 2, 4], "window_size": 4}
    vision |= {"num_groups": [1, 2, 2, 4], "projection_dim": 32, "drop_path_rate": 0.0}
    config = Florence2Config(
        text_config=text.to_dict(), vision_config=vision, image_token_id=tokenizer.image_token_id, **SPECIAL
    )
    save(Florence2ForConditionalGeneration(config), folder)
    processor.save_pretrained(folder)
