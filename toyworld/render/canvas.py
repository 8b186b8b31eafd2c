"""A small drawing kit: filled, outlined, patterned shapes in a unit frame, on an RGBA patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

PATCH = 224
"""Side of the square patch a subject is drawn on, before it is scaled down to its place; pixels."""

RGB = tuple[int, int, int]
Point = tuple[float, float]
Pattern = Literal["plain", "striped", "dotted", "checkered"]

_SHIFT = 4
_UNIT = PATCH * 0.33
"""Pixels of one unit of the drawing frame; drawings reach from about -1.2 to 1.2 and may be rotated."""


@dataclass
class Canvas:
    """Drawings use a frame with x to the right, y down and the origin in the middle. `rgb`: (P, P, 3) uint8; `alpha`:
    (P, P) uint8."""

    angle_deg: float = 0.0
    flip: bool = False
    pattern: Pattern = "plain"
    pattern_rgb: RGB = (255, 255, 255)
    pattern_step: float = 0.3
    rgb: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((PATCH, PATCH, 3), np.uint8))
    alpha: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((PATCH, PATCH), np.uint8))

    def polygon(self, points: Sequence[Point], color: RGB, *, patterned: bool = False, outline: float = 0.05) -> None:
        """Fills a polygon; `patterned` lays the identity's pattern over it; `outline` is a width in units, 0 for
        none."""
        corners = self._pixels(points)
        if patterned and self.pattern != "plain":
            self._fill_patterned(corners, color)
        else:
            cv2.fillPoly(self.rgb, [corners], color, cv2.LINE_AA, _SHIFT)
        cv2.fillPoly(self.alpha, [corners], 255, cv2.LINE_8, _SHIFT)
        if outline:
            self._stroke(corners, darker(color), outline, closed=True)

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        color: RGB,
        *,
        patterned: bool = False,
        outline: float = 0.05,
        turn_deg: float = 0.0,
        arc_deg: tuple[float, float] = (0.0, 360.0),
    ) -> None:
        """An ellipse, or the part of one between two angles (clockwise from the right), closed by a chord."""
        t = np.radians(np.linspace(*arc_deg, 40))
        a = np.radians(turn_deg)
        ex, ey = rx * np.cos(t), ry * np.sin(t)
        points = np.stack([x + ex * np.cos(a) - ey * np.sin(a), y + ex * np.sin(a) + ey * np.cos(a)], 1)
        self.polygon([(float(px), float(py)) for px, py in points], color, patterned=patterned, outline=outline)

    def rectangle(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        color: RGB,
        *,
        radius: float = 0.0,
        patterned: bool = False,
        outline: float = 0.05,
    ) -> None:
        """A rectangle with rounded corners."""
        if not radius:
            self.polygon([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], color, patterned=patterned, outline=outline)
            return
        r = min(radius, abs(x2 - x1) / 2, abs(y2 - y1) / 2)
        points: list[Point] = []
        for cx, cy, start in ((x2 - r, y1 + r, -90), (x2 - r, y2 - r, 0), (x1 + r, y2 - r, 90), (x1 + r, y1 + r, 180)):
            for t in np.radians(np.linspace(start, start + 90, 7)):
                points.append((cx + r * float(np.cos(t)), cy + r * float(np.sin(t))))
        self.polygon(points, color, patterned=patterned, outline=outline)

    def blob(self, points: Sequence[Point], color: RGB, *, patterned: bool = False, outline: float = 0.05) -> None:
        """A smooth closed curve through the points (Catmull-Rom)."""
        p = np.array(points, np.float64)
        before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
        t = np.linspace(0, 1, 9)[:-1, None, None]
        curve = 0.5 * (
            2 * p
            + (after - before) * t
            + (2 * before - 5 * p + 4 * after - beyond) * t**2
            + (3 * p - before - 3 * after + beyond) * t**3
        )
        smooth = curve.transpose(1, 0, 2).reshape(-1, 2)
        self.polygon([(float(x), float(y)) for x, y in smooth], color, patterned=patterned, outline=outline)

    def line(self, points: Sequence[Point], width: float, color: RGB) -> None:
        """An open stroke with round ends; `width` in units."""
        pixels = self._pixels(points)
        self._stroke(pixels, color, width, closed=False)
        thickness = max(1, round(width * _UNIT))
        cv2.polylines(self.alpha, [pixels], False, 255, thickness, cv2.LINE_8, _SHIFT)

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, color: RGB) -> None:
        """The outline of an ellipse, thick: a handle, say."""
        t = np.linspace(0, 2 * np.pi, 36)
        circle = [(x + rx * float(np.cos(a)), y + ry * float(np.sin(a))) for a in t]
        self.line(circle, width + 0.05, darker(color))
        self.line(circle, width, color)

    def eye(self, x: float, y: float, radius: float = 0.12) -> None:
        self.ellipse(x, y, radius, radius, (250, 250, 250), outline=0.03)
        self.ellipse(x + radius * 0.25, y, radius * 0.55, radius * 0.55, (20, 20, 25), outline=0)

    def _pixels(self, points: Sequence[Point]) -> NDArray[np.int32]:
        p = np.array(points, np.float64)
        if self.flip:
            p[:, 0] *= -1
        a = np.radians(self.angle_deg)
        turned = p @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
        scaled: NDArray[np.int32] = np.round((turned * _UNIT + PATCH / 2) * (1 << _SHIFT)).astype(np.int32)
        return scaled

    def _stroke(self, pixels: NDArray[np.int32], color: RGB, width: float, *, closed: bool) -> None:
        cv2.polylines(self.rgb, [pixels], closed, color, max(1, round(width * _UNIT)), cv2.LINE_AA, _SHIFT)

    def _fill_patterned(self, corners: NDArray[np.int32], color: RGB) -> None:
        stencil = np.zeros((PATCH, PATCH), np.uint8)
        cv2.fillPoly(stencil, [corners], 255, cv2.LINE_8, _SHIFT)
        inside = stencil > 0
        on = pattern_mask(self.pattern, self.pattern_step * _UNIT)
        self.rgb[inside & ~on] = color
        self.rgb[inside & on] = self.pattern_rgb


def pattern_mask(pattern: Pattern, step_px: float) -> NDArray[np.bool_]:
    """(P, P) bool: where the pattern shows its second color."""
    y, x = np.mgrid[:PATCH, :PATCH].astype(np.float32) / np.float32(step_px)
    if pattern == "striped":
        return np.asarray((x + 0.35 * y) % 1 < 0.42)
    if pattern == "checkered":
        return np.asarray((np.floor(x) + np.floor(y)) % 2 == 0)
    if pattern == "dotted":
        return np.asarray(((x % 1) - 0.5) ** 2 + ((y % 1) - 0.5) ** 2 < 0.075)
    return np.zeros((PATCH, PATCH), bool)


def darker(color: RGB, share: float = 0.55) -> RGB:
    return (int(color[0] * share), int(color[1] * share), int(color[2] * share))


def lighter(color: RGB, share: float = 0.45) -> RGB:
    r, g, b = (int(c + (255 - c) * share) for c in color)
    return (r, g, b)
