"""Which steps may change the weights: one loss that explodes, or one NaN, would undo days of training."""

from __future__ import annotations

import math
from typing import Any

from subject_diffusion.errors import RunError
from train.trainer.recipe import OptimizerSettings

_NEWEST_SHARE = 0.02  # of the newest step in the running mean


class LossGuard:
    """Skips steps whose loss or gradient is not finite, or whose diffusion loss is `exploding` times its running mean.
    The total would not do: the balanced attention loss may take it below zero, where such a comparison means nothing.
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self._settings = settings
        self.mean_loss: float | None = None
        """Running mean of the diffusion loss over the steps that were not skipped."""
        self.skipped = self.skipped_in_a_row = 0

    def allows(self, step: int, total: float, diffusion: float, gradient_norm: float) -> bool:
        """Whether the optimizer may follow this step's gradient. Raises RunError when `most_skipped` steps in a row may
        not be followed."""
        exploded = self.mean_loss is not None and diffusion > self._settings.exploding * self.mean_loss
        if all(map(math.isfinite, (total, diffusion, gradient_norm))) and not exploded:
            self.skipped_in_a_row = 0
            before = diffusion if self.mean_loss is None else self.mean_loss
            self.mean_loss = before + _NEWEST_SHARE * (diffusion - before)
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self._settings.most_skipped:
            raise RunError(
                f"step {step}: diffusion loss {diffusion:.3g}, total {total:.3g}, gradient norm {gradient_norm:.3g}, "
                f"where the diffusion loss was {self.mean_loss or math.nan:.3g} on average, {self.skipped_in_a_row} "
                "times in a row; lower optimizer.lr, or set run.precision=float32"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"mean_loss": self.mean_loss, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean_loss = state["mean_loss"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
