"""The measures, as functions of features: each with its formula and its source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Mask = NDArray[np.bool_]


def cosines(generated: Tensor, photographs: Sequence[Tensor]) -> list[float]:
    """cos(g, p) of one picture with each photograph: DINO and CLIP-I of DreamBooth (Ruiz et al. 2023), one pair each.
    All (D,), of length 1."""
    return [float(generated @ photograph) for photograph in photographs]


def masked_max_cosine(reference: Tensor, mask: Mask, generated: Tensor) -> float:
    """1/|F| · Σ_{i ∈ F} max_j cos(r_i, g_j): for each reference patch of the subject, the most alike patch of the whole
    generated picture (MaSC's concept preservation, arXiv 2605.22469).

    reference: (N, D), generated: (M, D), of length 1; mask: (N,) bool, F, not empty.
    """
    return float((reference[mask.tolist()] @ generated.T).amax(dim=1).mean())


def patch_mask(mask: Mask, grid: tuple[int, int]) -> Mask:
    """A mask (H, W) by patches (h · w,): those that it covers by half or more; where there is none, those it covers
    most."""
    height, width = grid
    covered = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA).ravel()
    halves: Mask = covered >= min(0.5, float(covered.max()))
    return halves


def margin(own: Sequence[float], look_alikes: Sequence[Sequence[float]]) -> float:
    """mean(own) − max over look-alikes of mean(theirs): how far the right subject is ahead of the nearest other one of
    its kind, by whichever similarity. Positive: told apart, as in NearID (arXiv 2604.01973), whose distractors also
    share the background."""
    return float(np.mean(own)) - max(float(np.mean(theirs)) for theirs in look_alikes)


def copy_paste(generated: Tensor, shown: Tensor, others: Sequence[Tensor]) -> float:
    """mean over t of (θ(g, t) − θ(g, r)) / θ(r, t), where θ is the angle between embeddings, r the reference that was
    shown, t the subject's other photographs: 1 for a copy of the reference, about 0 for another photograph of the
    subject, −1 for a copy of t (MultiID-Bench, arXiv 2510.14975). All (D,), of length 1."""
    shares = [
        (_angle(generated, other) - _angle(generated, shown)) / max(_angle(shown, other), 1e-6) for other in others
    ]
    return float(np.mean(shares))


def _angle(a: Tensor, b: Tensor) -> float:
    # From the chord: acos of a cosine near 1 loses half of the digits.
    return 2 * math.asin(min(1.0, float((a - b).double().norm()) / 2))
