"""A small BLIP captioner, trained from scratch on rendered scenes.

    python -m toyworld.pretrain.captioner --warm-steps 3830 --steps 2400 --out toyworld/weights/blip

It begins from the vision tower of `tower.py`, and keeps that tower's dense loss beside the caption loss throughout.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from toyworld.pretrain.card import WEIGHTS, save_pretrained, write_scores
from toyworld.pretrain.loop import LoopSettings, seconds_spent, train
from toyworld.pretrain.scenes import SceneSet, load_scenes
from toyworld.pretrain.tower import SIZE, DenseTower, SceneBatch, batches, dense_loss, vision_settings, warm_tower
from toyworld.pretrain.vocabulary import build_tokenizer
from toyworld.render.captions import PLURALS

LONGEST = 48  # tokens of a caption with [CLS] and [SEP], at most
DENSE_WEIGHT = 1.0


def build_captioner(tokenizer: BertTokenizerFast) -> nn.Module:
    """BlipForConditionalGeneration with fresh weights; captions run from [DEC] to [SEP], as the hub's."""
    config = BlipConfig(
        vision_config=vision_settings(),
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": LONGEST,
            "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=128,
        image_text_hidden_size=128,
    )
    model: nn.Module = BlipForConditionalGeneration(config)
    return model


def build_processor(tokenizer: BertTokenizerFast) -> BlipProcessor:
    return BlipProcessor(BlipImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer)


class CaptionerInTraining(nn.Module):
    """BLIP with the tower's two heads still on it."""

    def __init__(self, model: Any, tower: DenseTower) -> None:
        super().__init__()
        self.model = model
        self.patch_head, self.image_head = tower.patch_head, tower.image_head
        model.vision_model.load_state_dict(tower.vision.state_dict())

    def forward(self, batch: SceneBatch, tokens: Tensor, attended: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens, attended: (B, T) int64, the captions and 1 where a token is one."""
        labels = tokens.masked_fill(attended == 0, -100)
        output = self.model(pixel_values=batch.pixels, input_ids=tokens, attention_mask=attended, labels=labels)
        seen = output.last_hidden_state
        dense, measures = dense_loss(seen.float(), self.patch_head, self.image_head, batch)
        return output.loss + DENSE_WEIGHT * dense, {"caption": output.loss.detach(), **measures}


def caption_loss(
    tokenizer: BertTokenizerFast, captions: Sequence[str]
) -> Callable[[nn.Module, SceneBatch], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of a CaptionerInTraining on a batch whose rows index `captions`."""
    encoded = tokenizer(list(captions), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    tokens, attended = encoded["input_ids"], encoded["attention_mask"]
    tokens[:, 0] = tokenizer.convert_tokens_to_ids("[DEC]")

    def loss(model: nn.Module, batch: SceneBatch) -> tuple[Tensor, dict[str, Tensor]]:
        longest = int(attended[batch.rows].sum(dim=1).max())
        with torch.autocast("cpu", torch.bfloat16):
            value: tuple[Tensor, dict[str, Tensor]] = model(
                batch, tokens[batch.rows, :longest], attended[batch.rows, :longest]
            )
        return value

    return loss


def named_nouns(caption: str) -> frozenset[str]:
    """The toy world's nouns among the caption's words, in the singular."""
    words = set(caption.split())
    return frozenset(noun for noun, plural in PLURALS.items() if noun in words or plural in words)


@torch.no_grad()
def evaluate(folder: Path, scenes: SceneSet) -> dict[str, float]:
    """Scores of greedy captions by the weights in `folder`, through its own processor, on `scenes`.

    `exact_noun_set`: share of captions that name exactly the nouns of the true caption; precision and recall of nouns;
    `exact_caption`: share of captions equal to the true one word for word.
    """
    model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    said: list[str] = []
    for start in range(0, len(scenes), 50):
        inputs = processor(images=list(np.array(scenes.images[start : start + 50])), return_tensors="pt")
        tokens = model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=LONGEST - 2, do_sample=False)
        said += processor.batch_decode(tokens, skip_special_tokens=True)
    read = processor.tokenizer(list(scenes.captions))["input_ids"]
    plain = processor.batch_decode(read, skip_special_tokens=True)  # the spacing and case that said has
    pairs = [(named_nouns(one), named_nouns(other)) for one, other in zip(said, plain, strict=True)]
    common = sum(len(one & other) for one, other in pairs)
    return {
        "exact_noun_set": sum(one == other for one, other in pairs) / len(pairs),
        "noun_precision": common / max(sum(len(one) for one, _ in pairs), 1),
        "noun_recall": common / sum(len(other) for _, other in pairs),
        "exact_caption": sum(one == other for one, other in zip(said, plain, strict=True)) / len(pairs),
        "scenes": len(scenes),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm-steps", type=int, default=3830, help="steps of the vision tower's warm-up")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=20_000, help="training scenes, seeds 0 … scenes - 1")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "blip")
    parser.add_argument("--work", type=Path, default=Path("out/pretrain"), help="folder of the checkpoints")
    parser.add_argument("--heldout", type=int, default=500, help="held-out scenes to score on")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    scenes = load_scenes(args.scenes)
    tower = warm_tower(scenes, args.warm_steps, args.seed, args.work / "tower")
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(LONGEST)
    processor, captioner = build_processor(tokenizer), CaptionerInTraining(build_captioner(tokenizer), tower)

    def export(averaged: nn.Module, step: int) -> None:
        assert isinstance(averaged, CaptionerInTraining)
        save_pretrained(averaged.model, processor, args.out)

    settings = LoopSettings(steps=args.steps, lr=7e-4, seed=args.seed)
    loss = caption_loss(tokenizer, scenes.captions)
    train(captioner, batches(scenes, args.seed + 1, images=32), loss, settings, args.work / "blip", export)
    scores = evaluate(args.out, load_scenes(args.heldout, "heldout"))
    print(scores)
    spent = seconds_spent(args.work / "tower") + seconds_spent(args.work / "blip")
    write_scores(args.out, "captioner", args, spent, scores)


if __name__ == "__main__":
    main()
