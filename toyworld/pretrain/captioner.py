"""A small BLIP captioner, trained from scratch on rendered scenes.

    python -m toyworld.pretrain.captioner --warm-steps 3830 --steps 12000 --out toyworld/weights/blip

Three stages, each resumable: the vision tower alone (`tower.py`); tower and decoder together, the tower's dense loss
beside the caption loss; then the decoder alone, on what the finished tower sees of scenes that it has not trained on.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
from argparse import Namespace
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
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from subject_diffusion.loading_bars import no_loading_bars
from toyworld.pretrain.card import WEIGHTS, save_pretrained, write_scores
from toyworld.pretrain.command import parser
from toyworld.pretrain.loop import LoopSettings, fast_precision, seconds_spent, train
from toyworld.pretrain.scenes import CACHE, SceneSet, load_scenes
from toyworld.pretrain.tower import SIZE, DenseTower, SceneBatch, batches, dense_loss, vision_settings, warm_tower
from toyworld.pretrain.vocabulary import build_tokenizer
from toyworld.render import render_scene
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
    tokens, attended = _encode(tokenizer, captions)

    def loss(model: nn.Module, batch: SceneBatch) -> tuple[Tensor, dict[str, Tensor]]:
        longest = int(attended[batch.rows].sum(dim=1).max())
        with fast_precision():
            value: tuple[Tensor, dict[str, Tensor]] = model(
                batch, tokens[batch.rows, :longest], attended[batch.rows, :longest]
            )
        return value

    return loss


def _encode(tokenizer: BertTokenizerFast, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens from [DEC] to [SEP] and 1 where there is one; both (N, T) int64."""
    encoded = tokenizer(list(captions), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    tokens: Tensor = encoded["input_ids"]
    tokens[:, 0] = tokenizer.convert_tokens_to_ids("[DEC]")
    return tokens, encoded["attention_mask"]


@torch.no_grad()
def see(vision: Any, processor: BlipProcessor, seeds: range) -> tuple[Tensor, list[str]]:
    """What the finished tower sees of fresh scenes: states (N, 1 + P, D) bfloat16, and their captions."""
    states: list[Tensor] = []
    captions: list[str] = []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        drawn = pool.imap(_draw, seeds, chunksize=64)
        for _ in range(0, len(seeds), 50):
            images, said = zip(*itertools.islice(drawn, 50), strict=True)
            pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
            with fast_precision():
                states.append(vision(pixel_values=pixels).last_hidden_state.bfloat16())
            captions += said
    return torch.cat(states), captions


def _draw(seed: int) -> tuple[NDArray[np.uint8], str]:
    scene = render_scene(seed, size=128)
    return scene.image, scene.caption


def decoder_loss(
    tokenizer: BertTokenizerFast, captions: Sequence[str], states: Tensor
) -> Callable[[Any, NDArray[np.int64]], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of BLIP's decoder on indices into `states`: cross-entropy in which a noun counts three times."""
    tokens, attended = _encode(tokenizer, captions)
    worth = torch.ones(len(tokenizer))
    worth[tokenizer.convert_tokens_to_ids([*PLURALS, *PLURALS.values()])] = 3

    def loss(decoder: Any, picks: NDArray[np.int64]) -> tuple[Tensor, dict[str, Tensor]]:
        longest = int(attended[picks].sum(dim=1).max())
        said, real = tokens[picks, :longest], attended[picks, :longest]
        with fast_precision():
            logits = decoder(input_ids=said, attention_mask=real, encoder_hidden_states=states[picks].float()).logits
        each = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), said[:, 1:], reduction="none")
        weight = worth[said[:, 1:]] * real[:, 1:]
        noun = (weight == 3) & (real[:, 1:] == 1)
        right = (logits[:, :-1].argmax(dim=-1) == said[:, 1:])[noun].float().mean()
        return (each * weight).sum() / weight.sum(), {"nouns": right}

    return loss


def named_nouns(caption: str) -> frozenset[str]:
    """The toy world's nouns among the caption's words, in the singular."""
    words = set(caption.replace(",", " ").split())
    return frozenset(noun for noun, plural in PLURALS.items() if noun in words or plural in words)


@torch.no_grad()
def evaluate(folder: Path, scenes: SceneSet) -> dict[str, float]:
    """Scores of captions by the weights in `folder`, through its own processor, on `scenes`.

    `exact_noun_set`: share of captions that name exactly the nouns of the true caption, of greedy captions and of those
    by a search with 3 beams; precision and recall of nouns in the latter.
    """
    model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    drawn = [named_nouns(caption) for caption in scenes.captions]
    said: dict[int, list[frozenset[str]]] = {1: [], 3: []}
    for start in range(0, len(scenes), 50):
        inputs = processor(images=list(np.array(scenes.images[start : start + 50])), return_tensors="pt")
        for beams, found in said.items():
            tokens = model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=LONGEST - 2, num_beams=beams)
            found += map(named_nouns, processor.batch_decode(tokens, skip_special_tokens=True))
    common = sum(len(one & other) for one, other in zip(said[3], drawn, strict=True))
    return {
        "exact_noun_set_greedy": float(np.mean([one == other for one, other in zip(said[1], drawn, strict=True)])),
        "exact_noun_set_3_beams": float(np.mean([one == other for one, other in zip(said[3], drawn, strict=True)])),
        "noun_precision": common / max(sum(map(len, said[3])), 1),
        "noun_recall": common / sum(map(len, drawn)),
        "scenes": len(scenes),
    }


def train_whole(args: Namespace) -> tuple[Any, Any, BertTokenizerFast]:
    """Trains the captioner, whose vision tower is warmed up first, on the scenes. Returns it, its processor and its
    tokenizer."""
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
    trained: Any = train(
        captioner, batches(scenes, args.seed + 1, images=32), loss, settings, args.work / "blip", export
    )
    return trained.model, processor, tokenizer


def train_decoder(args: Namespace, model: Any, processor: Any, tokenizer: BertTokenizerFast) -> None:
    """Trains the decoder alone, on more scenes, of which the tower is asked once what it sees."""
    seen, captions = see(model.vision_model, processor, range(args.scenes, args.scenes + args.fresh))

    def picks_at(step: int) -> NDArray[np.int64]:
        return np.random.default_rng((args.seed, step)).choice(len(seen), 64, replace=False)

    def export(averaged: nn.Module, step: int) -> None:
        model.text_decoder.load_state_dict(averaged.state_dict())
        save_pretrained(model, processor, args.out)

    settings = LoopSettings(steps=args.decoder_steps, lr=1e-3, warmup=100, seed=args.seed)
    decoder = copy.deepcopy(model.text_decoder).train().requires_grad_(True)
    train(
        decoder,
        picks_at,
        decoder_loss(tokenizer, captions, seen),
        settings,
        args.work / "blip-decoder",
        export,
    )


@no_loading_bars()
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=12_000, out=WEIGHTS / "blip", work=CACHE)
    options.add_argument("--warm-steps", type=int, default=3830, help="steps of the vision tower's warm-up")
    options.add_argument("--decoder-steps", type=int, default=5000, help="steps of the decoder alone, at the end")
    options.add_argument("--fresh", type=int, default=40_000, help="more scenes, which only the decoder learns from")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    model, processor, tokenizer = train_whole(args)
    train_decoder(args, model, processor, tokenizer)
    scores = evaluate(args.out, load_scenes(args.heldout, "heldout"))
    print(scores)
    spent = sum(seconds_spent(args.work / stage) for stage in ("tower", "blip", "blip-decoder"))
    write_scores(args.out, "captioner", args, spent, scores)


if __name__ == "__main__":
    main()
