"""The funnel: rows in, what each stage took and why, rows kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.table import Table

from datapipe.schema import Outcome, Reason, StageName

Losses = dict[tuple[StageName, Reason, Outcome], int]
"""Rows by what became of them; those that were kept are not among them."""


class FunnelStep(NamedTuple):
    """One line of the funnel. `outcome` is "total" in the first and last, which take no rows."""

    stage: str
    reason: str
    outcome: str
    lost: int
    left: int


def in_stage_order(losses: Losses) -> Iterator[tuple[StageName, Reason, Outcome, int]]:
    """Stage, reason, outcome and rows, in the order in which rows meet the stages."""
    stages = list(StageName)
    for key in sorted(losses, key=lambda key: (stages.index(key[0]), key[1].value, key[2].value)):
        yield *key, losses[key]


def funnel(rows: int, losses: Losses) -> list[FunnelStep]:
    """`rows`: of the whole input."""
    steps = [FunnelStep("input", "", "total", 0, rows)]
    for stage, reason, outcome, lost in in_stage_order(losses):
        steps.append(FunnelStep(stage.value, reason.value, outcome.value, lost, steps[-1].left - lost))
    return [*steps, FunnelStep("kept", "", "total", 0, steps[-1].left)]


def funnel_table(steps: list[FunnelStep]) -> Table:
    """The funnel for the terminal."""
    table = Table(title="funnel", title_justify="left", box=None)
    for heading in ("stage", "reason", "outcome"):
        table.add_column(heading)
    for heading in ("rows", "left"):
        table.add_column(heading, justify="right")
    for step in steps:
        outcome = "" if step.outcome == "total" else step.outcome
        lost = f"-{step.lost:,}" if step.lost else ""
        table.add_row(step.stage, step.reason, outcome, lost, f"{step.left:,}", style=_style(step))
    return table


def _style(step: FunnelStep) -> str:
    return "bold" if step.stage == "kept" else ""
