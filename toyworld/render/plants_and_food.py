"""What grows, and what is eaten."""

from __future__ import annotations

import math

from toyworld.render.canvas import Canvas, darker, lighter
from toyworld.render.identity import Look

LEAF = (70, 150, 60)
WOOD = (130, 85, 50)


def flower(c: Canvas, k: Look) -> None:
    c.line([(0, 0.1), (0.05, 1.15)], 0.14, darker(LEAF, 0.85))
    c.ellipse(0.35, 0.75, 0.32, 0.14, LEAF, turn_deg=-30)
    c.ellipse(-0.28, 0.9, 0.3, 0.13, LEAF, turn_deg=30)
    petals = 5 + round(3 * k.shape[0])
    for i in range(petals):
        a = 2 * math.pi * i / petals
        c.ellipse(
            0.48 * math.cos(a), -0.4 + 0.48 * math.sin(a), 0.34, 0.24, k.main, turn_deg=math.degrees(a), patterned=True
        )
    c.ellipse(0, -0.4, 0.27, 0.27, k.second)


def mushroom(c: Canvas, k: Look) -> None:
    c.blob([(-0.25, 0.0), (0.25, 0.0), (0.36, 0.85), (0.25, 1.0), (-0.25, 1.0), (-0.36, 0.85)], (240, 228, 205))
    c.ellipse(0, 0.12, 1.0, 0.9 + 0.2 * k.shape[0], k.main, arc_deg=(180, 360))
    c.ellipse(0, 0.12, 0.98, 0.12, darker(k.main, 0.75), outline=0.02)
    for x, y, r in ((-0.5, -0.2, 0.17), (0.05, -0.45, 0.2), (0.55, -0.15, 0.15)):
        c.ellipse(x, y, r, r * 0.9, lighter(k.second), outline=0.03)


def tree(c: Canvas, k: Look) -> None:
    c.polygon([(-0.16, 0.2), (0.16, 0.2), (0.24, 1.15), (-0.24, 1.15)], WOOD)
    r = 0.46 + 0.08 * k.shape[0]
    for x, y in ((-0.45, 0.0), (0.45, 0.0), (-0.28, -0.5), (0.28, -0.5), (0, -0.75), (0, -0.15)):
        c.ellipse(x, y, r, r, k.main)
    c.ellipse(0, -0.3, 0.62, 0.6, k.main, outline=0, patterned=True)
    for x, y in ((-0.45, -0.05), (0.42, -0.15), (0.0, -0.6), (0.05, 0.1)):
        c.ellipse(x, y, 0.1, 0.1, k.second, outline=0.02)


def apple(c: Canvas, k: Look) -> None:
    c.blob(
        [
            (0, -0.55),
            (0.5, -0.75),
            (0.92, -0.3),
            (0.8, 0.45),
            (0.35, 0.95),
            (0, 0.85),
            (-0.35, 0.95),
            (-0.8, 0.45),
            (-0.92, -0.3),
            (-0.5, -0.75),
        ],
        k.main,
        patterned=True,
        outline=0.07,
    )
    c.line([(0, -0.5), (0.05, -1.1)], 0.11, WOOD)
    c.ellipse(0.35, -0.95, 0.32, 0.15, LEAF, turn_deg=-20)
    c.ellipse(-0.5, -0.2, 0.12, 0.25, lighter(k.main, 0.7), outline=0, turn_deg=20)


def banana(c: Canvas, k: Look) -> None:
    fat = 0.15 * k.shape[0]
    c.blob(
        [
            (-1.05, -0.55),
            (-0.7, 0.1),
            (0, 0.38),
            (0.7, 0.1),
            (1.05, -0.55),
            (1.12, 0.05),
            (0.75, 0.7 + fat),
            (0, 0.98 + fat),
            (-0.75, 0.7 + fat),
            (-1.12, 0.05),
        ],
        k.main,
        patterned=True,
        outline=0.07,
    )
    for side in (-1, 1):
        c.rectangle(side * 1.07 - 0.1, -0.75, side * 1.07 + 0.1, -0.45, (90, 65, 35))
    c.line([(-0.85, 0.25), (0, 0.68), (0.85, 0.25)], 0.05, darker(k.main, 0.75))


def cactus(c: Canvas, k: Look) -> None:
    c.line([(-0.3, 0.3), (-0.72, 0.3), (-0.72, -0.25 - 0.2 * k.shape[0])], 0.34, darker(k.main, 0.8))
    c.line([(0.3, 0.05), (0.72, 0.05), (0.72, -0.5 + 0.2 * k.shape[1])], 0.34, darker(k.main, 0.8))
    c.rectangle(-0.36, -1.05, 0.36, 0.7, k.main, radius=0.34, patterned=True)
    for x in (-0.15, 0.15):
        c.line([(x, -0.8), (x, 0.55)], 0.04, darker(k.main))
    c.ellipse(0, -1.05, 0.17, 0.14, (240, 90, 150), outline=0.03)
    c.polygon([(-0.6, 0.55), (0.6, 0.55), (0.45, 1.15), (-0.45, 1.15)], k.second)
    c.rectangle(-0.68, 0.48, 0.68, 0.7, k.second)


def cupcake(c: Canvas, k: Look) -> None:
    c.polygon([(-0.75, 0.1), (0.75, 0.1), (0.52, 1.05), (-0.52, 1.05)], k.second)
    for x in (-0.45, -0.15, 0.15, 0.45):
        c.line([(x, 0.15), (x * 0.72, 1.0)], 0.05, darker(k.second, 0.7))
    for y, rx in ((0.08, 0.88), (-0.25, 0.68), (-0.55, 0.45)):
        c.ellipse(0, y, rx, 0.27, k.main, patterned=True)
    c.ellipse(0, -0.88, 0.19, 0.19, (220, 40, 60) if k.shape[0] < 0.5 else (90, 60, 160))
