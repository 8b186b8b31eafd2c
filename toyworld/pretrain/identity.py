"""A small DINOv2 that tells individuals apart, trained from scratch on drawn look-alikes.

    python -m toyworld.pretrain.identity --steps 2400 --seed 0 --out toyworld/weights/identity

Its batches are of groups of individuals that share noun and colors, so that it has to look at shades, patterns and
shapes. Two views of an individual are drawn together, all others apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from datapipe.backends.patch_features import PatchFeatures, cut_out, pooled
from datapipe.pairs.settings import EmbedSettings
from toyworld.pretrain.card import WEIGHTS, save_half, write_scores
from toyworld.pretrain.command import parser
from toyworld.pretrain.cutouts import Cutouts, draw_cutouts
from toyworld.pretrain.loop import LoopSettings, fast_precision, seconds_spent, train
from toyworld.pretrain.scenes import CACHE
from toyworld.render.look_alikes import LOOKED_THROUGH

SIDE = 48  # of the square that the encoder sees, pixels
PATCH = 8
GRID = 4
TOGETHER = 4  # look-alikes in a group
DRAWN_PX = 96
GROUPS = 8  # in a batch
TEMPERATURE = 0.06
THRESHOLD, STEEPNESS = 0.75, 24.0  # of the cosine that divides individuals, once the encoder is calibrated
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


def build_encoder() -> nn.Module:
    """Dinov2Model with fresh weights."""
    model: nn.Module = Dinov2Model(
        Dinov2Config(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            mlp_ratio=4,
            image_size=SIDE,
            patch_size=PATCH,
            initializer_range=0.02,
        )
    )
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
        seen = []
        for group in rng.choice(len(drawn.rgb), groups, replace=False):
            for individual in range(TOGETHER):
                for view in rng.choice(drawn.rgb.shape[2], 2, replace=False):
                    place = group, individual, view
                    hiding = drawn.alpha[rng.integers(len(drawn.alpha)), 0, 0] > 127
                    seen.append(seen_in_a_scene(drawn.rgb[place], drawn.alpha[place], hiding, rng))
        return as_views(seen)

    return batch_at


def as_views(seen: Sequence[tuple[NDArray[np.uint8], NDArray[np.bool_]]]) -> Views:
    background = [v * 255 for v in MEAN]
    cut = [cut_out(pixels, mask, SIDE, background) for pixels, mask in seen]
    pixels = torch.from_numpy(np.stack([one for one, _ in cut])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return Views((pixels - mean) / std, torch.from_numpy(np.stack([covered for _, covered in cut])))


def seen_in_a_scene(
    rgb: NDArray[np.uint8], alpha: NDArray[np.uint8], hiding: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A drawn subject as a dataset has it: small, on some color, here and there behind another subject, in a mask that
    is a little off. rgb: (S, S, 3), alpha, hiding: (S, S)."""
    side = int(rng.integers(DRAWN_PX * 2 // 5, DRAWN_PX + 1))
    rgb, alpha = (cv2.resize(one, (side, side), interpolation=cv2.INTER_AREA).astype(np.uint8) for one in (rgb, alpha))
    share = (alpha.astype(np.float32) / 255)[..., None]
    ground = rng.integers(40, 220, 3) + rng.normal(0, 12, (side, side, 3))
    picture = np.clip(rgb * share + ground * (1 - share) + rng.normal(0, 2, (side, side, 3)), 0, 255).astype(np.uint8)
    mask = alpha > 127
    if rng.random() < 0.35:
        other = cv2.resize(hiding.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST) > 0
        away = (rng.choice([-1, 1], 2) * rng.integers(side // 3, side * 2 // 3 + 1, 2)).tolist()
        shown = mask & ~np.roll(other, away, (0, 1))
        mask = shown if shown.sum() > 0.55 * mask.sum() else mask
    by = int(rng.integers(-2, 3)) * side // DRAWN_PX
    kernel = np.ones((2 * abs(by) + 1,) * 2, np.uint8)
    moved = (cv2.dilate if by > 0 else cv2.erode)(mask.astype(np.uint8), kernel) > 0
    return picture, moved if moved.sum() > 0.5 * mask.sum() else mask


def identity_loss(model: nn.Module, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the other view of the same individual among all other views in the batch, by the cosines of
    embeddings (InfoNCE, van den Oord et al. 2018), and again within each group by the patch-wise similarity that pairs
    are verified by."""
    loss, measures, _ = _compared(model, views)
    return loss, measures


def _compared(model: nn.Module, views: Views) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The loss, measures, and both similarities of the views of each group, (G, 2 · TOGETHER, 2 · TOGETHER)."""
    with fast_precision():
        hidden = model(pixel_values=views.pixels).last_hidden_state[:, 1:].float()
    tokens = hidden.reshape(len(hidden), SIDE // PATCH, SIDE // PATCH, -1)
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


def evaluate(folder: Path, drawn: Cutouts, seed: int = 0) -> dict[str, float]:
    """`nearest_is_same`: share of views whose nearest other view is of the same individual, among two views of each
    individual of `drawn`; a guess is right where it is among its look-alikes by 1 in 2 · TOGETHER − 1."""
    rng = np.random.default_rng(seed)
    features = PatchFeatures(EmbedSettings(model=str(folder)), GRID)
    subjects = []
    for group in range(len(drawn.rgb)):
        for individual in range(drawn.rgb.shape[1]):
            for view in range(2):
                place = group, individual, view
                hiding = drawn.alpha[rng.integers(len(drawn.alpha)), 0, 0] > 127
                subjects.append(seen_in_a_scene(drawn.rgb[place], drawn.alpha[place], hiding, rng))
    embedding = np.stack([f.embedding for f in features(subjects)])
    cosine = embedding @ embedding.T
    np.fill_diagonal(cosine, -1)
    right = cosine.argmax(axis=1) == np.arange(len(cosine)) ^ 1
    return {"nearest_is_same": float(right.mean()), "views": len(right)}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=2400, out=WEIGHTS / "identity", work=CACHE / "identity")
    options.set_defaults(scenes=LOOKED_THROUGH)
    options.add_argument("--groups", type=int, default=24, help="groups of look-alikes of each noun to learn from")
    options.add_argument("--calibration-steps", type=int, default=600)
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    drawn = draw_cutouts("train", args.groups, TOGETHER, views=4, size=DRAWN_PX, processes=2)

    def export(averaged: nn.Module, step: int) -> None:
        save_encoder(averaged, args.out)

    ranked = LoopSettings(steps=args.steps, lr=2e-3, warmup=100, ema=0.99, seed=args.seed)
    encoder = train(build_encoder(), batches(drawn, args.seed, GROUPS), identity_loss, ranked, args.work)
    calibrated = LoopSettings(steps=args.calibration_steps, lr=1e-3, warmup=50, ema=0.99, seed=args.seed)
    encoder.requires_grad_(True)
    train(encoder, batches(drawn, args.seed + 1, GROUPS), calibrated_loss, calibrated, args.work / "calibrated", export)
    held_out = draw_cutouts("heldout", 4, TOGETHER, views=2, size=DRAWN_PX, processes=2)
    scores = evaluate(args.out, held_out)
    print(scores)
    seconds = seconds_spent(args.work) + seconds_spent(args.work / "calibrated")
    write_scores(args.out, "identity", args, seconds, scores)


if __name__ == "__main__":
    main()
