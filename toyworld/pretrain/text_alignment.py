"""How well images show what their captions say, as the toy CLIP and the toy Grounding DINO see it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoProcessor, GroundingDinoForObjectDetection

from toyworld.pretrain.clip import embeddings
from toyworld.pretrain.grounding import THRESHOLD
from toyworld.render import NOUNS


def caption_similarity(folder: Path, images: NDArray[np.uint8], captions: Sequence[str]) -> float:
    """Mean cosine of each image (N, H, W, 3) uint8 with its own caption, by the CLIP in `folder`."""
    seen, read = embeddings(folder, images, captions)
    return float((seen * read).sum(dim=1).mean())


@torch.no_grad()
def noun_rates(folder: Path, images: NDArray[np.uint8], nouns: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Shares of nouns that the Grounding DINO in `folder` finds: of those of each image, and of as many others.

    Every image is asked for both in one prompt, in random order, so that a detector which says yes to anything is seen.
    """
    model = GroundingDinoForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    found = {True: 0, False: 0}
    for image, own in zip(images, nouns, strict=True):
        others = rng.choice([noun for noun in NOUNS if noun not in own], len(own), replace=False)
        asked = rng.permutation([*own, *others])
        inputs = processor(images=[image], text=[" . ".join(asked) + " ."], return_tensors="pt")
        logits = model(**inputs).logits[0, :, 1 : 1 + 2 * len(asked) : 2]  # one token a noun, a dot after each
        for noun, score in zip(asked, logits.sigmoid().amax(dim=0), strict=True):
            found[noun in own] += bool(score > THRESHOLD)
    total = sum(map(len, nouns))
    return found[True] / total, found[False] / total
