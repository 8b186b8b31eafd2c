"""What moves people."""

from __future__ import annotations

from toyworld.render.canvas import Canvas, darker, lighter
from toyworld.render.identity import Look

GLASS = (185, 225, 240)
TYRE = (45, 45, 50)
STEEL = (190, 190, 195)


def car(c: Canvas, k: Look) -> None:
    roof = 0.5 + 0.15 * k.shape[0]
    c.polygon([(-0.7, 0.05), (-0.45, -roof), (0.4, -roof), (0.75, 0.05)], k.second)
    c.polygon([(-0.52, 0.0), (-0.36, -roof + 0.14), (-0.06, -roof + 0.14), (-0.06, 0.0)], GLASS, outline=0.03)
    c.polygon([(0.06, 0.0), (0.06, -roof + 0.14), (0.33, -roof + 0.14), (0.55, 0.0)], GLASS, outline=0.03)
    c.rectangle(-1.15, -0.02, 1.15, 0.52, k.main, radius=0.18, patterned=True)
    c.ellipse(-1.02, 0.15, 0.1, 0.1, (255, 240, 150), outline=0.02)
    for x in (-0.62, 0.62):
        c.ellipse(x, 0.52, 0.27, 0.27, TYRE)
        c.ellipse(x, 0.52, 0.12, 0.12, STEEL, outline=0)


def boat(c: Canvas, k: Look) -> None:
    c.line([(0, 0.4), (0, -1.15)], 0.1, (110, 75, 45))
    c.polygon([(0.08, -1.1), (0.85 + 0.2 * k.shape[0], 0.2), (0.08, 0.2)], k.second, patterned=True)
    c.polygon([(-0.08, -0.85), (-0.7, 0.2), (-0.08, 0.2)], lighter(k.second))
    c.polygon([(-1.15, 0.35), (1.15, 0.35), (0.75, 1.0), (-0.75, 1.0)], k.main)
    c.rectangle(-1.18, 0.3, 1.18, 0.47, lighter(k.main))
    for x in (-0.4, 0.0, 0.4):
        c.ellipse(x, 0.7, 0.1, 0.1, GLASS, outline=0.03)


def rocket(c: Canvas, k: Look) -> None:
    c.blob([(-0.25, 0.75), (0.25, 0.75), (0.14, 1.05), (0, 1.22), (-0.14, 1.05)], (250, 170, 40), outline=0.02)
    for side in (-1, 1):
        c.polygon(
            [(side * 0.35, 0.2), (side * 0.85, 0.7 + 0.15 * k.shape[0]), (side * 0.8, 0.95), (side * 0.3, 0.75)],
            k.second,
        )
    c.blob(
        [(0, -1.2), (0.42, -0.55), (0.46, 0.2), (0.34, 0.8), (-0.34, 0.8), (-0.46, 0.2), (-0.42, -0.55)],
        k.main,
        patterned=True,
        outline=0.06,
    )
    c.polygon([(-0.33, -0.72), (0, -1.22), (0.33, -0.72)], k.second)
    c.ellipse(0, -0.25, 0.23, 0.23, GLASS, outline=0.08)


def train(c: Canvas, k: Look) -> None:
    c.rectangle(0.2, -0.75, 1.05, 0.55, k.main)
    c.rectangle(0.05, -0.92, 1.18, -0.7, k.second)
    c.rectangle(0.4, -0.5, 0.85, -0.05, GLASS)
    c.rectangle(-0.9, -0.2, 0.2, 0.55, k.main, radius=0.12, patterned=True)
    c.polygon(
        [(-0.75, -0.2), (-0.85, -0.7 - 0.2 * k.shape[0]), (-0.4, -0.7 - 0.2 * k.shape[0]), (-0.5, -0.2)], k.second
    )
    c.ellipse(-0.15, -0.22, 0.17, 0.17, k.second)
    c.polygon([(-0.9, 0.4), (-1.2, 0.8), (-0.8, 0.8)], k.second)
    for x, r in ((-0.6, 0.22), (-0.1, 0.22), (0.62, 0.33)):
        c.ellipse(x, 0.87 - r * 0.5, r, r, TYRE)
        c.ellipse(x, 0.87 - r * 0.5, r * 0.45, r * 0.45, STEEL, outline=0)


def balloon(c: Canvas, k: Look) -> None:
    wide = 0.72 + 0.12 * k.shape[0]
    for side in (-1, 1):
        c.line([(side * 0.45, 0.3), (side * 0.2, 0.82)], 0.05, darker(k.second))
    c.blob(
        [
            (0, -1.15),
            (wide, -0.75),
            (wide * 0.95, -0.15),
            (0.4, 0.4),
            (-0.4, 0.4),
            (-wide * 0.95, -0.15),
            (-wide, -0.75),
        ],
        k.main,
        patterned=True,
        outline=0.06,
    )
    c.ellipse(0, 0.38, 0.4, 0.09, k.second, outline=0.03)
    c.rectangle(-0.28, 0.78, 0.28, 1.18, (165, 110, 60), radius=0.06)
    c.rectangle(-0.32, 0.74, 0.32, 0.88, k.second, radius=0.04)


def umbrella(c: Canvas, k: Look) -> None:
    c.line([(0, -0.2), (0, 0.95), (0.1, 1.1), (0.28, 1.08), (0.32, 0.9)], 0.13, (110, 75, 50))
    c.ellipse(0, 0.15, 1.1, 1.05 + 0.15 * k.shape[0], k.main, arc_deg=(180, 360), patterned=True, outline=0.06)
    for i in range(4):
        x = -0.825 + 0.55 * i
        c.ellipse(x, 0.16, 0.275, 0.16, k.second, arc_deg=(180, 360), outline=0.03)
    c.line([(0, -0.95), (0, -1.12)], 0.1, (110, 75, 50))
