"""A small CLIP, trained from scratch on rendered scenes and their captions.

    python -m toyworld.pretrain.clip --steps 3500 --seed 0 --out toyworld/weights/clip

The vision tower begins from BLIP's, which `captioner` trains. The tokenizer is BERT's, with the toy vocabulary: CLIP
takes any tokenizer whose end token the config names, here [SEP], where the text is pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    BertTokenizerFast,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
)

from subject_diffusion.loading_bars import no_loading_bars
from toyworld.pretrain.card import WEIGHTS, save_pretrained, write_scores
from toyworld.pretrain.command import parser
from toyworld.pretrain.loop import LoopSettings, fast_precision, seconds_spent, train
from toyworld.pretrain.scenes import CACHE, SceneSet, load_scenes
from toyworld.pretrain.tower import SIZE, SceneBatch, batches, vision_settings
from toyworld.pretrain.vocabulary import build_tokenizer

LONGEST = 48  # tokens of a caption with [CLS] and [SEP], at most


def build_clip(tokenizer: BertTokenizerFast) -> nn.Module:
    """CLIPModel with fresh weights."""
    config = CLIPConfig(
        vision_config=vision_settings(),
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": LONGEST,
            "hidden_act": "gelu",
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=128,
    )
    model: nn.Module = CLIPModel._from_config(config, attn_implementation="eager")
    return model


def build_processor(tokenizer: BertTokenizerFast) -> CLIPProcessor:
    size = {"height": SIZE, "width": SIZE}
    return CLIPProcessor(CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size), tokenizer)


def begin_from_tower(clip: Any, tower: nn.Module) -> None:
    """Copies a BLIP ViT's weights into CLIP's vision tower, in place.

    Two things differ: CLIP's patches have no bias, so that goes into the patches' positions; and CLIP normalizes the
    embeddings before its first block, so that norm begins at the scale which the blocks were trained on.
    """
    source, vision = tower.state_dict(), clip.vision_model
    position = source["embeddings.position_embedding"][0].clone()
    position[1:] += source["embeddings.patch_embedding.bias"]
    target = {
        "embeddings.class_embedding": source["embeddings.class_embedding"].flatten(),
        "embeddings.patch_embedding.weight": source["embeddings.patch_embedding.weight"],
        "embeddings.position_embedding.weight": position,
        "pre_layrnorm.weight": torch.full((position.shape[1],), float(position.std())),
    }
    for name, value in source.items():
        if name.startswith("post_layernorm"):
            target[name] = value
        elif ".qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                target[name.replace("qkv", f"{part}_proj")] = third
        elif name.startswith("encoder."):
            target[name.replace("self_attn.projection", "self_attn.out_proj")] = value
    unexpected = vision.load_state_dict(target, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"CLIP's vision tower has no {unexpected}")


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3) and the share of images whose own caption scores highest.

    images, texts: (B, D) of unit length, row i of one belonging to row i of the other; scale: () multiplies cosines.
    """
    logits = scale * images @ texts.T
    own = torch.arange(len(logits))
    loss = (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2
    return loss, (logits.argmax(dim=1) == own).float().mean()


def clip_loss(
    tokenizer: BertTokenizerFast, captions: Sequence[str]
) -> Callable[[Any, SceneBatch], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of CLIP on a batch whose rows index `captions`."""
    encoded = tokenizer(list(captions), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    tokens, attended = encoded["input_ids"], encoded["attention_mask"]

    def loss(model: Any, batch: SceneBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with fast_precision():
            output = model(pixel_values=batch.pixels, input_ids=tokens[batch.rows], attention_mask=attended[batch.rows])
        images, texts = (
            nn.functional.normalize(each.float(), dim=-1) for each in (output.image_embeds, output.text_embeds)
        )
        value, right = contrastive_loss(images, texts, model.logit_scale.exp().clamp(max=100))
        return value, {"retrieval": right}

    return loss


@torch.no_grad()
def embeddings(folder: Path, images: NDArray[np.uint8], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """By the CLIP in `folder`, of images (N, H, W, 3) uint8 and of as many captions: (N, D) each, of length 1."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    parts = []
    for start in range(0, len(images), 50):
        rows = slice(start, start + 50)
        shown = list(np.array(images[rows]))
        output = model(**processor(text=list(captions[rows]), images=shown, padding=True, return_tensors="pt"))
        parts.append((output.image_embeds, output.text_embeds))
    seen, read = (torch.cat(each) for each in zip(*parts, strict=True))
    return seen, read


def evaluate(folder: Path, scenes: SceneSet, candidates: int = 32, trials: int = 20) -> dict[str, float]:
    """`retrieval`: share of images whose own caption scores highest among `candidates` held-out captions.

    The other captions are drawn at random, `trials` times for each image; one that reads the same as the own counts as
    right. `retrieval_all` is the same among the captions of all of `scenes`.
    """
    seen, read = embeddings(folder, scenes.images, scenes.captions)
    cosine = (seen @ read.T).numpy()
    rng = np.random.default_rng(0)
    right = []
    for row, own in enumerate(scenes.captions):
        others = np.delete(np.arange(len(scenes)), row)
        for _ in range(trials):
            pool = np.append(rng.choice(others, candidates - 1, replace=False), row)
            right.append(scenes.captions[pool[cosine[row, pool].argmax()]] == own)
    whole = [scenes.captions[best] == own for best, own in zip(cosine.argmax(axis=1), scenes.captions, strict=True)]
    return {
        f"retrieval_among_{candidates}": float(np.mean(right)),
        f"retrieval_among_{len(scenes)}": float(np.mean(whole)),
        "scenes": len(scenes),
    }


@no_loading_bars()
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=3500, out=WEIGHTS / "clip", work=CACHE / "clip")
    options.add_argument(
        "--tower", type=Path, default=WEIGHTS / "blip", help="BLIP whose vision tower CLIP begins from"
    )
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    scenes = load_scenes(args.scenes)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(LONGEST)
    processor, model = build_processor(tokenizer), build_clip(tokenizer)
    blip = BlipForConditionalGeneration.from_pretrained(args.tower, dtype=torch.float32)
    begin_from_tower(model, blip.vision_model)

    def export(averaged: nn.Module, step: int) -> None:
        save_pretrained(averaged, processor, args.out)

    settings = LoopSettings(steps=args.steps, lr=5e-4, warmup=100, seed=args.seed)
    loss = clip_loss(tokenizer, scenes.captions)
    train(model, batches(scenes, args.seed + 2, images=48), loss, settings, args.work, export)
    scores = evaluate(args.out, load_scenes(args.heldout, "heldout"))
    print(scores)
    write_scores(args.out, "clip", args, seconds_spent(args.work), scores)


if __name__ == "__main__":
    main()
