"""Between text and image: how much of each step is the base's, and how much the subject model's."""

from __future__ import annotations

from typing import Literal

Interpolation = Literal["blend", "switch"]


def base_share(alpha: float, time: float, interpolation: Interpolation) -> float:
    """How much of a step's prediction is the base's, 0..1: α, or, by "switch" [paper], all of it where t / T < α.
    time: t / T."""
    return alpha if interpolation == "blend" else float(time < alpha)
