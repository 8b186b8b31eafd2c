"""What stands about the house, and the house."""

from __future__ import annotations

import math

from toyworld.render.canvas import Canvas, darker, lighter
from toyworld.render.identity import Look

GLASS = (185, 225, 240)
INK = (35, 30, 35)
WOOD = (130, 85, 50)


def mug(c: Canvas, k: Look) -> None:
    c.ring(0.72, 0.1, 0.35 + 0.08 * k.shape[0], 0.42, 0.15, k.second)
    c.rectangle(-0.8, -0.75, 0.7, 0.95, k.main, radius=0.2, patterned=True)
    c.ellipse(-0.05, -0.75, 0.75, 0.2, lighter(k.main))
    c.ellipse(-0.05, -0.73, 0.6, 0.13, (85, 50, 30), outline=0)


def house(c: Canvas, k: Look) -> None:
    c.rectangle(0.4, -1.05, 0.66, -0.4, (150, 85, 70))
    c.rectangle(-0.85, -0.2, 0.85, 1.05, k.main, patterned=True)
    peak = 1.0 + 0.15 * k.shape[0]
    c.polygon([(-1.1, -0.15), (0, -peak), (1.1, -0.15)], k.second, outline=0.07)
    c.rectangle(-0.22, 0.35, 0.22, 1.05, WOOD)
    c.ellipse(0.12, 0.72, 0.05, 0.05, (240, 210, 90), outline=0)
    for x in (-0.55, 0.55):
        c.rectangle(x - 0.19, 0.1, x + 0.19, 0.5, GLASS)
        c.line([(x, 0.1), (x, 0.5)], 0.04, INK)


def robot(c: Canvas, k: Look) -> None:
    c.line([(0, -0.9), (0, -1.15)], 0.07, INK)
    c.ellipse(0, -1.15, 0.1, 0.1, (230, 60, 50), outline=0.02)
    for side in (-1, 1):
        c.rectangle(side * 0.8 - 0.13, -0.05, side * 0.8 + 0.13, 0.6, k.second, radius=0.1)
        c.rectangle(side * 0.32 - 0.17, 0.75, side * 0.32 + 0.17, 1.15, k.second)
        c.rectangle(side * 0.6 - 0.1, -0.65, side * 0.6 + 0.1, -0.4, k.second)
    c.rectangle(-0.58, -0.92, 0.58, -0.18, k.main, radius=0.1)
    c.rectangle(-0.66, -0.15, 0.66, 0.8, k.main, radius=0.08, patterned=True)
    for side in (-1, 1):
        c.ellipse(side * 0.26, -0.62, 0.15, 0.15, (255, 245, 160), outline=0.05)
        c.ellipse(side * 0.26, -0.62, 0.06, 0.06, INK, outline=0)
    c.rectangle(-0.3, -0.38, 0.3, -0.28, INK, outline=0)
    c.rectangle(-0.35, 0.08, 0.35, 0.48, lighter(k.second), outline=0.04)
    for i, light in enumerate(((230, 60, 50), (250, 200, 60), (80, 200, 90))):
        c.ellipse(-0.2 + 0.2 * i, 0.28, 0.07, 0.07, light, outline=0)


def lamp(c: Canvas, k: Look) -> None:
    c.rectangle(-0.1, 0.05, 0.1, 0.95, darker(k.second, 0.8), outline=0.03)
    c.ellipse(0, 0.55, 0.34, 0.3, k.second)
    c.rectangle(-0.58, 0.92, 0.58, 1.15, k.second, radius=0.1)
    top = 0.35 + 0.15 * k.shape[0]
    c.polygon([(-top, -1.1), (top, -1.1), (0.95, 0.15), (-0.95, 0.15)], k.main, patterned=True, outline=0.06)
    c.ellipse(0, 0.17, 0.2, 0.09, (255, 245, 170), outline=0)


def chair(c: Canvas, k: Look) -> None:
    leg = darker(k.main, 0.7)
    for x1, x2 in ((-0.52, -0.62), (0.55, 0.65)):
        c.polygon([(x1 - 0.1, 0.3), (x1 + 0.1, 0.3), (x2 + 0.09, 1.15), (x2 - 0.09, 1.15)], leg)
    c.rectangle(-0.65, -1.15, 0.65, 0.25, k.main, radius=0.2, outline=0.06)
    c.rectangle(-0.42, -0.92, 0.42, -0.05, k.second, radius=0.12, patterned=True)
    c.rectangle(-0.78, 0.12, 0.78, 0.5, k.main, radius=0.12)


def clock(c: Canvas, k: Look) -> None:
    for side in (-1, 1):
        c.line([(side * 0.5, 0.7), (side * 0.68, 1.08)], 0.16, darker(k.main))
        c.ellipse(side * 0.52, -0.92, 0.3, 0.24, k.second, turn_deg=side * 35)
    c.ellipse(0, 0, 0.9, 0.9, k.main, outline=0.07)
    c.ellipse(0, 0, 0.68, 0.68, (246, 242, 222), outline=0.03)
    for i in range(12):
        a = math.pi * i / 6
        c.line([(0.55 * math.cos(a), 0.55 * math.sin(a)), (0.62 * math.cos(a), 0.62 * math.sin(a))], 0.06, INK)
    for turn, length in ((k.shape[0], 0.35), (k.shape[1], 0.52)):
        c.line([(0, 0), (length * math.sin(6.28 * turn), -length * math.cos(6.28 * turn))], 0.08, INK)


def bell(c: Canvas, k: Look) -> None:
    c.ring(0, -0.98, 0.17, 0.15, 0.1, k.second)
    c.ellipse(0, 0.92, 0.24, 0.22, darker(k.second, 0.8))
    flare = 0.95 + 0.12 * k.shape[0]
    c.blob(
        [
            (0, -0.9),
            (0.42, -0.72),
            (0.58, -0.1),
            (0.7, 0.45),
            (flare, 0.8),
            (0, 0.86),
            (-flare, 0.8),
            (-0.7, 0.45),
            (-0.58, -0.1),
            (-0.42, -0.72),
        ],
        k.main,
        patterned=True,
        outline=0.07,
    )
    c.rectangle(-0.72, 0.3, 0.72, 0.48, k.second)


def hat(c: Canvas, k: Look) -> None:
    c.ellipse(0, 0.6, 1.2, 0.32, k.main, outline=0.06)
    tall = 0.75 + 0.25 * k.shape[0]
    c.polygon([(-0.62, 0.55), (-0.7, -tall), (0.7, -tall), (0.62, 0.55)], k.main, patterned=True, outline=0.06)
    c.ellipse(0, -tall, 0.7, 0.15, lighter(k.main))
    c.rectangle(-0.65, 0.15, 0.65, 0.48, k.second)


def shoe(c: Canvas, k: Look) -> None:
    c.blob(
        [
            (-1.05, -0.55),
            (-0.5, -0.65),
            (-0.2, -0.6),
            (0.05, -0.15),
            (0.7, 0.05),
            (1.12, 0.3),
            (1.12, 0.55),
            (-1.1, 0.55),
            (-1.12, 0.0),
        ],
        k.main,
        patterned=True,
        outline=0.06,
    )
    c.blob([(0.72, 0.05), (1.12, 0.3), (1.14, 0.55), (0.55, 0.55)], lighter(k.second), outline=0.04)
    c.rectangle(-1.18, 0.48, 1.2, 0.72, (240, 234, 220), radius=0.1)
    for i in range(3):
        x = -0.12 + 0.22 * i
        c.line([(x, -0.38 + 0.18 * i), (x + 0.22, -0.12 + 0.1 * i)], 0.07, k.second)


def star(c: Canvas, k: Look) -> None:
    inner = 0.55 + 0.08 * k.shape[0]
    points = [
        (
            (1.15 if i % 2 == 0 else inner) * math.sin(math.pi * i / 5),
            -(1.15 if i % 2 == 0 else inner) * math.cos(math.pi * i / 5),
        )
        for i in range(10)
    ]
    c.polygon(points, k.main, patterned=True, outline=0.08)
    for side in (-1, 1):
        c.ellipse(side * 0.22, -0.15, 0.09, 0.13, INK, outline=0)
    c.ellipse(0, 0.12, 0.25, 0.2, k.second, outline=0.03, arc_deg=(0, 180))


def teapot(c: Canvas, k: Look) -> None:
    c.ring(-0.8, 0.1, 0.34, 0.42, 0.15, k.second)
    c.polygon([(0.5, 0.45), (0.9, -0.4), (1.2, -0.5), (1.12, -0.28), (0.75, 0.65)], k.second)
    c.ellipse(0, 0.25, 0.82, 0.68 + 0.08 * k.shape[0], k.main, patterned=True, outline=0.07)
    c.ellipse(0, -0.38, 0.48, 0.16, lighter(k.main))
    c.ellipse(0, -0.62, 0.14, 0.14, k.second)
    c.rectangle(-0.5, 0.85, 0.5, 1.02, k.second, radius=0.06)
