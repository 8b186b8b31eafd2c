"""A subject cut out of a picture, and how far the colors of two are apart."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from model import prepare_reference
from model.reference import Mask

QUANTILES = np.linspace(0.02, 0.98, 25)
CANVAS_PX = 64
"""Side of the squares that colors and patterns are compared on."""


class Cutout:
    """A subject cut out and centered, on white; and its colors, CIELAB."""

    def __init__(self, image: Image.Image, mask: Mask) -> None:
        self.picture = prepare_reference(image, mask, CANVAS_PX)
        silhouette = prepare_reference(Image.new("RGB", image.size), mask, CANVAS_PX)
        self.inside = np.asarray(silhouette.convert("L")) < 128
        """(CANVAS_PX, CANVAS_PX) bool."""
        self.lab = cv2.cvtColor(np.asarray(self.picture, np.float32) / 255, cv2.COLOR_RGB2LAB)
        """(CANVAS_PX, CANVAS_PX, 3) float32."""


def colors_apart(one: Cutout, other: Cutout) -> float:
    """mean |Q(a) − Q(b)|, where Q are 25 quantiles of L, a and b (CIELAB) inside the mask: colors, whatever their
    places."""
    first, second = (np.quantile(c.lab[c.inside], QUANTILES, axis=0) for c in (one, other))
    return float(np.abs(first - second).mean())
