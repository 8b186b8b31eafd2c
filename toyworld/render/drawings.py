"""Every noun of the toy world and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from toyworld.render import animals, plants_and_food, things, vehicles
from toyworld.render.canvas import Canvas
from toyworld.render.identity import Identity, Look

_DRAWINGS: dict[str, Callable[[Canvas, Look], None]] = {
    draw.__name__: draw
    for draw in (
        animals.fish,
        animals.snail,
        animals.cat,
        animals.bird,
        animals.butterfly,
        animals.crab,
        animals.penguin,
        animals.turtle,
        plants_and_food.flower,
        plants_and_food.mushroom,
        plants_and_food.tree,
        plants_and_food.apple,
        plants_and_food.banana,
        plants_and_food.cactus,
        plants_and_food.cupcake,
        vehicles.car,
        vehicles.boat,
        vehicles.rocket,
        vehicles.train,
        vehicles.balloon,
        vehicles.umbrella,
        things.mug,
        things.house,
        things.robot,
        things.lamp,
        things.chair,
        things.clock,
        things.bell,
        things.hat,
        things.shoe,
        things.star,
        things.teapot,
    )
}

NOUNS: tuple[str, ...] = tuple(sorted(_DRAWINGS))


def draw(identity: Identity, angle_deg: float, flip: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(h, w, 3) uint8 RGB and (h, w) uint8 alpha of the subject alone, cut to its bounding box."""
    look = identity.look
    canvas = Canvas(angle_deg, flip, look.pattern, look.pattern_rgb, look.pattern_step)
    _DRAWINGS[identity.noun](canvas, look)
    x, y, w, h = cv2.boundingRect(canvas.alpha)
    return canvas.rgb[y : y + h, x : x + w], canvas.alpha[y : y + h, x : x + w]
