r"""A small DINOv2 that tells individuals apart, trained from scratch on drawn look-alikes.

    python -m toyworld.pretrain.identity --steps 1300 --seed 0 --out toyworld/weights/identity
    python -m toyworld.pretrain.identity --steps 3000 --calibration-steps 1000 --redrawn 0.3 \
        --out toyworld/weights/identity-of-samples

Its batches are of groups of individuals that share noun and colors, so that it has to look at shades, patterns and
shapes. Individuals are seen in scenes, here and there behind others, and in masks that are as SAM's or a little off.
For `sdd evaluate`, which shows the encoder samples, the toy Stable Diffusion redraws some of the scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from datapipe.backends.patch_features import pooled
from toyworld.pretrain.card import WEIGHTS, save_half, write_scores
from toyworld.pretrain.command import parser
from toyworld.pretrain.cutouts import Cutouts, draw_cutouts
from toyworld.pretrain.loop import LoopSettings, fast_precision, seconds_spent, train
from toyworld.pretrain.scenes import CACHE
from toyworld.render import NOUNS
from toyworld.render.look_alikes import LOOKED_THROUGH

SIDE = 64  # of the square that the encoder sees, pixels
PATCH = 8
GRID = 4
TOGETHER = 4  # look-alikes in a group
VIEWS = 3  # of each individual
GROUPS = 16  # in a batch
TEMPERATURE = 0.06
THRESHOLD, STEEPNESS = 0.75, 24.0  # of the cosine that divides individuals, once the encoder is calibrated
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
BACKGROUND = [v * 255 for v in MEAN]


def build_encoder() -> nn.Module:
    """Dinov2Model with fresh weights; about 0.6 M parameters."""
    config = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=4,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=0.02,
    )
    model: nn.Module = Dinov2Model._from_config(config, attn_implementation="eager")  # twice as fast as sdpa in bf16
    return model


@dataclass(frozen=True)
class Views:
    """B subjects cut out, two views of each of `TOGETHER` individuals of a group after another. pixels: (B, 3, SIDE,
    SIDE) float32, normalized; covered: (B, SIDE, SIDE) float32 in 0..1."""

    pixels: Tensor
    covered: Tensor


def batches(drawn: Cutouts, seed: int, groups: int) -> Callable[[int], Views]:
    """Step -> batch of so many groups."""

    def batch_at(step: int) -> Views:
        rng = np.random.default_rng((seed, step))
        chosen = np.repeat(rng.choice(len(drawn.rgb), groups, replace=False), 2 * TOGETHER)
        individual = np.tile(np.repeat(np.arange(TOGETHER), 2), groups)
        views = rng.permuted(np.tile(np.arange(drawn.rgb.shape[2]), (groups * TOGETHER, 1)), axis=1)[:, :2].ravel()
        return as_views(drawn.rgb[chosen, individual, views], drawn.covered[chosen, individual, views])

    return batch_at


def as_views(rgb: NDArray[np.uint8], covered: NDArray[np.uint8]) -> Views:
    """rgb: (B, SIDE, SIDE, 3), covered: (B, SIDE, SIDE) in 1/255."""
    pixels = torch.from_numpy(rgb).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return Views((pixels - mean) / std, torch.from_numpy(covered).float() / 255)


def identity_loss(model: nn.Module, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the other view of the same individual among all other views in the batch, by the cosines of
    embeddings (InfoNCE, van den Oord et al. 2018), and again within each group by the patch-wise similarity that pairs
    are verified by."""
    loss, measures, _ = _compared(model, views)
    return loss, measures


def _compared(model: nn.Module, views: Views) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The loss, measures, and both similarities of the views of each group, (G, 2 · TOGETHER, 2 · TOGETHER)."""
    with fast_precision():
        tokens = _tokens(model, views)
    cells, cover, embedding = pooled(tokens, views.covered, GRID)
    partner = torch.arange(len(embedding)) ^ 1
    cosine = embedding @ embedding.T
    itself = torch.eye(len(embedding), dtype=torch.bool)
    logits = (cosine / TEMPERATURE).masked_fill(itself, -torch.inf)
    by_embedding = functional.cross_entropy(logits, partner)

    of_group = 2 * TOGETHER
    cells = cells.reshape(-1, of_group, *cells.shape[1:])
    patchwise = _patchwise(cells, (cover > 0.3).reshape(-1, of_group, cover.shape[1]))
    in_group = (patchwise / TEMPERATURE).masked_fill(torch.eye(of_group, dtype=torch.bool), -torch.inf)
    by_patches = functional.cross_entropy(in_group.flatten(0, 1), partner[:of_group].repeat(len(patchwise)))
    groups = torch.arange(len(embedding)).reshape(-1, of_group)
    right = (logits.argmax(dim=1) == partner).float().mean()
    measures = {"right": right, "patches": by_patches}
    return by_embedding + by_patches, measures, (cosine[groups[:, :, None], groups[:, None]], patchwise)


def _tokens(model: nn.Module, views: Views) -> Tensor:
    """(B, SIDE / PATCH, SIDE / PATCH, D) float32."""
    hidden: Tensor = model(pixel_values=views.pixels).last_hidden_state[:, 1:].float()
    return hidden.reshape(len(hidden), SIDE // PATCH, SIDE // PATCH, -1)


def _patchwise(cells: Tensor, shown: Tensor) -> Tensor:
    """(G, N, N) for each patch of one subject the most alike of the other, both ways. cells: (G, N, C, D) of length 1;
    shown: (G, N, C) bool."""
    alike = torch.einsum("gipd,gjqd->gijpq", cells, cells).masked_fill(~shown[:, None, :, None, :], -1)
    best = alike.amax(dim=-1) * shown[:, :, None]
    one_way = best.sum(dim=-1) / shown.sum(dim=-1)[:, :, None].clamp(min=1)
    return (one_way + one_way.transpose(1, 2)) / 2


def calibrated_loss(model: nn.Module, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
    """`identity_loss`, and the logistic loss of "the same" for every two views of a group, by either similarity against
    one threshold (Zhai et al. 2023, with both kinds of pairs weighted alike): by rank alone, each individual would have
    a threshold of its own."""
    loss, measures, similarities = _compared(model, views)
    of_group = 2 * TOGETHER
    others = ~torch.eye(of_group, dtype=torch.bool)
    same = torch.arange(of_group)[:, None] == torch.arange(of_group) ^ 1
    for similarity in similarities:
        logits = STEEPNESS * (similarity - THRESHOLD)
        loss = loss - functional.logsigmoid(logits[:, same]).mean()
        loss = loss - functional.logsigmoid(-logits[:, others & ~same]).mean()
    return loss, measures | {"threshold": loss}


def save_encoder(model: nn.Module, folder: Path) -> None:
    save_half(model, folder)
    size = {"height": SIDE, "width": SIDE}
    BitImageProcessor(size=size, crop_size=size, do_center_crop=False, image_mean=MEAN, image_std=STD).save_pretrained(
        folder
    )


@torch.no_grad()
def evaluate(folder: Path, drawn: Cutouts, redrawn: Cutouts) -> dict[str, float]:
    """By two views of each individual of `drawn`; redrawn: the same, as the toy Stable Diffusion redraws them.
    `nearest_is_same`: share of views whose nearest other view of all is of the same individual; a guess is right where
    it is among its look-alikes by 1 in 2 · TOGETHER − 1. `right_of_8_of_the_noun`: share of individuals whose one view
    is nearer to their other one than to one each of 7 others of the noun; a guess is right by 1 in 8; with
    `_redrawn`, the one view is redrawn."""
    model = Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    embedding, rough = (_embedded(model, shown) for shown in (drawn, redrawn))
    cosine = (embedding @ embedding.T).fill_diagonal_(-1)
    right = cosine.argmax(dim=1) == torch.arange(len(cosine)) ^ 1
    one, other = (view.reshape(len(NOUNS), -1, view.shape[1]) for view in (embedding[::2], embedding[1::2]))
    return {
        "nearest_is_same": float(right.float().mean()),
        "views": len(right),
        "right_of_8_of_the_noun": right_of_noun(one, other, 7),
        "right_of_8_of_the_noun_redrawn": right_of_noun(rough[::2].reshape(one.shape), other, 7),
    }


def _embedded(model: nn.Module, drawn: Cutouts) -> Tensor:
    """(individuals · 2, D), the first two views of each after another."""
    embeddings = []
    for rgb, covered in zip(drawn.rgb[:, :, :2], drawn.covered[:, :, :2], strict=True):
        views = as_views(rgb.reshape(-1, *rgb.shape[2:]), covered.reshape(-1, *covered.shape[2:]))
        embeddings.append(pooled(_tokens(model, views), views.covered, GRID)[2])
    return torch.cat(embeddings)


def right_of_noun(one: Tensor, other: Tensor, others: int) -> float:
    """Two views of each individual, each (noun, individual, D)."""
    cosine = one @ other.transpose(1, 2)
    rng = np.random.default_rng(0)
    right = [
        bool((row[torch.from_numpy(rng.permutation(np.delete(np.arange(len(row)), i))[:others])] < row[i]).all())
        for of_noun in cosine
        for i, row in enumerate(of_noun)
    ]
    return float(np.mean(right))


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=1300, out=WEIGHTS / "identity", work=CACHE / "identity")
    options.set_defaults(scenes=LOOKED_THROUGH)
    options.add_argument("--groups", type=int, default=48, help="groups of look-alikes of each noun to learn from")
    options.add_argument("--calibration-steps", type=int, default=600)
    options.add_argument("--redrawn", type=float, default=0.0, help="share of the scenes that Stable Diffusion redraws")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    drawn = draw_cutouts("train", args.groups, TOGETHER, VIEWS, SIDE, BACKGROUND, args.redrawn)

    def export(averaged: nn.Module, step: int) -> None:
        save_encoder(averaged, args.out)

    ranked = LoopSettings(steps=args.steps, lr=2e-3, warmup=100, ema=0.99, seed=args.seed)
    encoder = train(build_encoder(), batches(drawn, args.seed, GROUPS), identity_loss, ranked, args.work)
    calibrated = LoopSettings(steps=args.calibration_steps, lr=1e-3, warmup=50, ema=0.99, seed=args.seed)
    encoder.requires_grad_(True)
    train(encoder, batches(drawn, args.seed + 1, GROUPS), calibrated_loss, calibrated, args.work / "calibrated", export)
    held_out = (draw_cutouts("heldout", 4, TOGETHER, 2, SIDE, BACKGROUND, redrawn) for redrawn in (0.0, 1.0))
    scores = evaluate(args.out, *held_out)
    print(scores)
    seconds = seconds_spent(args.work) + seconds_spent(args.work / "calibrated")
    write_scores(args.out, "identity", args, seconds, scores)


if __name__ == "__main__":
    main()
