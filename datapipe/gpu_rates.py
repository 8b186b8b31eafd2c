"""How fast models are on GPUs, as others have measured and published it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRate:
    """Images/s on one `gpu`, of the model alone, so that it is an upper bound for the stage."""

    gpu: str
    images_per_s: float
    source: str


PUBLISHED = {
    "facebook/sam-vit-huge": PublishedRate("one A100", 21.7, "Ravi et al. 2024 (SAM 2, arXiv 2408.00714)"),
    "facebook/sam2-hiera-base-plus": PublishedRate("one A100", 130.1, "Ravi et al. 2024 (SAM 2, arXiv 2408.00714)"),
}
"""By hub id. For the captioners and detectors of the recipes no rate was found published."""
