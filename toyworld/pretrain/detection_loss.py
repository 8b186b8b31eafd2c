"""Losses of the grounding model: what each query and each token of the encoder should say, as pure functions.

Boxes are (cx, cy, w, h) in units of the image; `real` (B, N) bool says which rows hold an object. Phrases are places in
the prompt: an object's phrase is the index of its noun's token.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

SPREAD = 0.2  # of a box's side: how fast a token's worth falls with its distance from the box's center
LEVEL_SIDE = (0.35, 0.7, 1.4)  # side of the boxes, in units of the image, that each feature level is best for


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh to xyxy."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al. 2019) of boxes (..., 4) that broadcast together; (...,) each."""
    a, b = corners(one), corners(other)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = one[..., 2:].prod(-1) + other[..., 2:].prod(-1) - inner
    iou = inner / union.clamp(min=1e-7)
    return iou, iou - (hull - union) / hull.clamp(min=1e-7)


def box_loss(predicted: Tensor, boxes: Tensor) -> Tensor:
    """5 x L1 + 2 x (1 - GIoU), DETR's weights; (..., 4) twice to (...,)."""
    return 5 * (predicted - boxes).abs().sum(-1) + 2 * (1 - overlap(predicted, boxes)[1])


def quality_focal(logits: Tensor, target: Tensor) -> Tensor:
    """|target - p|^2 x cross-entropy against a soft target (Li et al. 2020, generalised focal loss), elementwise."""
    distance = target - logits.sigmoid()
    return distance.square() * binary_cross_entropy_with_logits(logits, target, reduction="none")


@torch.no_grad()
def match(logits: Tensor, predicted: Tensor, boxes: Tensor, phrases: Tensor, real: Tensor) -> Tensor:
    """For each object the query that answers for it, by the Hungarian method; (B, N) int64, 0 for unused rows.

    logits: (B, Q, T); predicted: (B, Q, 4); boxes: (B, N, 4); phrases, real: (B, N).
    """
    chance = logits.sigmoid().gather(2, phrases[:, None].expand(-1, logits.shape[1], -1))  # (B, Q, N)
    cost = box_loss(predicted[:, :, None], boxes[:, None]) - 4 * chance
    table = cost.masked_fill(~real[:, None], 0).float().numpy()
    chosen = np.zeros(boxes.shape[:2], dtype=np.int64)
    for row, (costs, count) in enumerate(zip(table, real.sum(1).tolist(), strict=True)):
        queries, objects = linear_sum_assignment(costs[:, :count])
        chosen[row, objects] = queries
    return torch.from_numpy(chosen)


def decoder_loss(
    logits: Tensor, predicted: Tensor, chosen: Tensor, boxes: Tensor, phrases: Tensor, real: Tensor, asked: Tensor
) -> tuple[Tensor, Tensor]:
    """One decoder layer: the chosen query of each object says its phrase as surely as its box is right, others nothing.

    logits: (B, Q, T); predicted: (B, Q, 4); chosen: (B, N), as `match` gives it; boxes: (B, N, 4); phrases, real:
    (B, N); asked: (B, T), False where the prompt is padding. Returns the loss over the number of objects, and the mean
    IoU.
    """
    count = real.sum().clamp(min=1)
    answer = predicted.gather(1, chosen[..., None].expand(-1, -1, 4))
    iou = overlap(answer.detach(), boxes)[0]
    target = torch.zeros_like(logits)
    row = torch.arange(len(logits))[:, None].expand_as(chosen)
    target[row[real], chosen[real], phrases[real]] = (0.1 + 0.9 * iou[real].clamp(min=0)).to(target.dtype)
    says = (quality_focal(logits, target) * asked[:, None]).sum() / count
    places = (box_loss(answer, boxes) * real).sum() / count
    return 4 * says + places, (iou * real).sum() / count


def token_worth(centers: Tensor, levels: Tensor, boxes: Tensor, real: Tensor) -> Tensor:
    """How fit each encoder token is to propose each object: 1 for the fittest, less with distance and wrong scale.

    centers: (B, S, 2) in units of the image; levels: (S,) int64; boxes: (B, N, 4); real: (B, N). Returns (B, S, N).
    """
    away = (centers[:, :, None] - boxes[:, None, :, :2]) / (SPREAD * boxes[:, None, :, 2:]).clamp(min=0.03)
    side = boxes[..., 2:].prod(-1).clamp(min=1e-4).sqrt()
    octaves = torch.log2(side[:, None] / torch.tensor(LEVEL_SIDE)[levels][None, :, None])
    exponent = -0.5 * away.square().sum(-1) - octaves.square()
    return (exponent - exponent.amax(dim=1, keepdim=True)).exp() * real[:, None]


def encoder_loss(
    logits: Tensor, predicted: Tensor, worth: Tensor, boxes: Tensor, phrases: Tensor, real: Tensor, asked: Tensor
) -> Tensor:
    """Dense supervision of the proposals: every token says each object's phrase as surely as it is fit to propose it.

    logits: (B, S, T); predicted: (B, S, 4); worth: (B, S, N); the rest as in `decoder_loss`.
    """
    count = real.sum().clamp(min=1)
    target = torch.zeros_like(logits)
    target.scatter_reduce_(2, phrases[:, None].expand_as(worth), worth.to(target.dtype), "amax")
    says = (quality_focal(logits, target) * asked[:, None]).sum() / count
    best, which = worth.max(dim=2)
    weight = best * (best > 0.05)
    near = boxes.gather(1, which[..., None].expand(-1, -1, 4))
    places = (box_loss(predicted, near) * weight).sum() / weight.sum().clamp(min=1)
    return 4 * says + places
