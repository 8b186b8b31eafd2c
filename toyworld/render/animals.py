"""Creatures."""

from __future__ import annotations

import math

from toyworld.render.canvas import Canvas, darker, lighter
from toyworld.render.identity import Look

BEAK = (245, 165, 35)
INK = (35, 30, 35)


def fish(c: Canvas, k: Look) -> None:
    height = 0.5 + 0.2 * k.shape[0]
    c.polygon([(0.5, 0), (1.15, -0.55 - 0.15 * k.shape[1]), (1.0, 0), (1.15, 0.55 + 0.15 * k.shape[1])], k.second)
    c.blob([(-0.3, -height * 0.8), (0.05, -height - 0.3), (0.45, -height * 0.5)], k.second)
    c.ellipse(-0.15, 0, 0.85, height, k.main, patterned=True)
    c.ellipse(0.05, 0.1, 0.2, 0.14, k.second, turn_deg=20)
    c.eye(-0.62, -0.12, 0.14)
    c.line([(-0.95, 0.12), (-0.78, 0.17)], 0.05, INK)


def snail(c: Canvas, k: Look) -> None:
    c.blob(
        [(-1.1, 0.75), (-1.0, 0.35), (-0.75, 0.3), (-0.6, 0.5), (0.3, 0.5), (1.1, 0.72), (0.9, 0.85), (-0.9, 0.85)],
        k.second,
    )
    for x in (-1.05, -0.8):
        c.line([(-0.9, 0.4), (x, -0.1)], 0.07, darker(k.second))
        c.ellipse(x, -0.12, 0.09, 0.09, INK, outline=0)
    r = 0.68 + 0.1 * k.shape[0]
    c.ellipse(0.15, 0.0, r, r, k.main, patterned=True, outline=0.07)
    turns = 2.2 + k.shape[1]
    spiral = [
        (
            0.15 + (r - 0.12) * (1 - t / 60) * math.cos(t * turns / 9.6),
            (r - 0.12) * (1 - t / 60) * math.sin(t * turns / 9.6),
        )
        for t in range(58)
    ]
    c.line(spiral, 0.07, darker(k.main))


def cat(c: Canvas, k: Look) -> None:
    c.line([(0.6, 0.8), (1.05, 0.5), (0.95, 0.0 - 0.3 * k.shape[0])], 0.2, darker(k.main, 0.8))
    c.ellipse(0.1, 0.6, 0.62, 0.55, k.main, patterned=True)
    for side in (-1, 1):
        c.polygon([(side * 0.62 - 0.1, -0.25), (side * 0.6 - 0.1, -1.1), (side * 0.08 - 0.1, -0.65)], k.main)
        c.polygon([(side * 0.5 - 0.1, -0.45), (side * 0.5 - 0.1, -0.85), (side * 0.2 - 0.1, -0.6)], k.second, outline=0)
        c.ellipse(side * 0.3 + 0.05, 1.05, 0.22, 0.13, lighter(k.main))
    c.ellipse(-0.1, -0.3, 0.72, 0.58, k.main)
    for side in (-1, 1):
        c.eye(side * 0.3 - 0.1, -0.38, 0.15)
        c.line([(side * 0.25 - 0.1, -0.08), (side * 0.85 - 0.1, -0.12)], 0.035, INK)
        c.line([(side * 0.25 - 0.1, 0.0), (side * 0.8 - 0.1, 0.08)], 0.035, INK)
    c.polygon([(-0.2, -0.16), (0.0, -0.16), (-0.1, -0.04)], (230, 120, 140), outline=0.02)


def bird(c: Canvas, k: Look) -> None:
    c.polygon([(0.5, 0.1), (1.2, -0.2), (1.2, 0.25), (0.55, 0.45)], k.second)
    for x in (-0.1, 0.2):
        c.line([(x, 0.6), (x, 1.05)], 0.07, BEAK)
        c.line([(x - 0.15, 1.05), (x + 0.12, 1.05)], 0.07, BEAK)
    c.polygon([(-0.85, -0.5), (-1.25, -0.33), (-0.8, -0.25)], BEAK)
    c.blob(
        [(-0.5, -0.85), (-0.15, -0.5), (0.5, 0.0), (0.75, 0.3), (0.2, 0.7), (-0.45, 0.55), (-0.75, 0.0), (-0.88, -0.5)],
        k.main,
    )
    c.blob([(-0.35, 0.05), (0.2, -0.2 - 0.1 * k.shape[0]), (0.75, 0.1), (0.2, 0.45)], k.second, patterned=True)
    c.eye(-0.55, -0.5, 0.12)


def butterfly(c: Canvas, k: Look) -> None:
    spread = 0.85 + 0.2 * k.shape[0]
    for side in (-1, 1):
        c.blob(
            [
                (side * 0.05, -0.1),
                (side * 0.4, -0.95),
                (side * (spread + 0.2), -0.9),
                (side * spread, -0.1),
                (side * 0.4, 0.1),
            ],
            k.main,
            patterned=True,
        )
        c.blob(
            [(side * 0.05, 0.05), (side * 0.7, 0.05), (side * (0.75 + 0.15 * k.shape[1]), 0.7), (side * 0.35, 0.9)],
            k.second,
        )
        c.ellipse(side * 0.65, -0.55, 0.17, 0.17, lighter(k.second), outline=0.04)
        c.ellipse(side * 0.5, 0.48, 0.12, 0.12, lighter(k.main), outline=0.04)
        c.line([(0, -0.5), (side * 0.2, -1.0)], 0.045, INK)
    c.ellipse(0, 0, 0.12, 0.65, (60, 50, 50))


def crab(c: Canvas, k: Look) -> None:
    for side in (-1, 1):
        for i in range(3):
            y = 0.25 + 0.2 * i
            c.line(
                [(side * 0.5, y), (side * (1.0 - 0.08 * i), y + 0.2), (side * (1.05 - 0.12 * i), y + 0.42)],
                0.12,
                darker(k.main, 0.8),
            )
        c.line([(side * 0.55, 0.0), (side * 0.9, -0.35)], 0.16, darker(k.main, 0.8))
        size = 0.3 + 0.08 * k.shape[0]
        c.ellipse(side * 0.88, -0.65, size, size, k.second)
        c.polygon([(side * 0.88, -0.62), (side * 0.72, -1.1), (side * 1.04, -1.1)], INK, outline=0)
        c.line([(side * 0.22, -0.2), (side * 0.22, -0.6)], 0.08, darker(k.main))
    c.ellipse(0, 0.2, 0.78, 0.52, k.main, patterned=True)
    for side in (-1, 1):
        c.eye(side * 0.22, -0.6, 0.14)
    c.ellipse(0, 0.3, 0.25, 0.14, INK, outline=0, arc_deg=(0, 180))


def penguin(c: Canvas, k: Look) -> None:
    for side in (-1, 1):
        c.ellipse(side * 0.3, 1.05, 0.27, 0.12, BEAK)
        c.ellipse(side * 0.68, 0.2, 0.16, 0.55, darker(k.main, 0.85), turn_deg=side * -14)
    c.ellipse(0, 0.15, 0.68, 0.95, k.main)
    c.ellipse(0, 0.35, 0.46, 0.68, (240, 238, 224), outline=0.02)
    c.ellipse(0, -0.65, 0.5, 0.46, k.main)
    c.ellipse(0, -0.55, 0.33, 0.28, (240, 238, 224), outline=0)
    for side in (-1, 1):
        c.eye(side * 0.17, -0.68, 0.1)
    c.polygon([(-0.14, -0.52), (0.14, -0.52), (0, -0.3)], BEAK)
    c.rectangle(-0.5, -0.28, 0.5, -0.1, k.second, radius=0.08, patterned=True)
    c.rectangle(0.15, -0.15, 0.35, 0.35 + 0.15 * k.shape[0], k.second, radius=0.06, patterned=True)


def turtle(c: Canvas, k: Look) -> None:
    skin = k.second
    c.polygon([(0.85, 0.5), (1.2, 0.62), (0.85, 0.68)], skin)
    for x in (-0.5, 0.5):
        c.rectangle(x - 0.18, 0.4, x + 0.18, 0.95, skin, radius=0.12)
    c.rectangle(-0.95, 0.0, -0.6, 0.5, skin, radius=0.1)
    c.ellipse(-1.0, -0.1, 0.28, 0.24, skin)
    c.eye(-1.08, -0.15, 0.09)
    c.ellipse(0.05, 0.5, 0.9, 0.95 + 0.15 * k.shape[0], k.main, arc_deg=(180, 360), patterned=True, outline=0.07)
    for x in (-0.35, 0.05, 0.45):
        c.blob(
            [(x, -0.05), (x + 0.17, 0.1), (x + 0.1, 0.3), (x - 0.1, 0.3), (x - 0.17, 0.1)],
            darker(k.main, 0.75),
            outline=0.02,
        )
    c.rectangle(-0.9, 0.42, 1.0, 0.6, lighter(k.main, 0.3), radius=0.08)
