"""Samples in words for the terminal, and their pictures where the terminal can show any."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from datapipe.inspect.draw import draw_sample, outcome_text
from datapipe.schema import Sample, printable

IMAGE_COLUMNS = (
    "shard, row, key, outcome, stage, reason, detail, caption, list_transform(entities, lambda e: e.tag) AS tags"
)
CANDIDATE_COLUMNS = "shard, row, key, reason, tag, score, text_score, area, aspect"


_LINES_LEFT = 2
"""For the prompt below a picture."""
_CELL_PX = (10, 20)
"""About the size of a character: what is written into a picture then has about the size of the terminal's own text."""


def image_line(row: dict[str, Any]) -> str:
    """A row of `IMAGE_COLUMNS` in words."""
    if row["outcome"] == "kept":
        return f"{row['key']}  kept  {', '.join(row['tags'])}  “{row['caption']}”"
    return f"{row['key']}  {row['outcome']}  {row['stage']}/{row['reason']}  {row['detail']}"


def candidate_line(row: dict[str, Any]) -> str:
    """A row of `CANDIDATE_COLUMNS` in words."""
    scores = f"score {row['score']:.3f}  text {row['text_score']:.3f}"
    shape = f"area {row['area']:.3f}  aspect {row['aspect']:.2f}"
    return f"{row['key']}  {row['tag']}  {scores}  {shape}  {row['reason'] or 'entity'}"


def sample_details(key: str, sample: Sample) -> Group:
    """What is known about a sample, with all its candidates."""
    table = Table(box=None)
    for heading in ("tag", "score", "text score", "box, px", "predicted IoU", "stability", ""):
        table.add_column(heading, justify="left" if heading in ("tag", "") else "right")
    for c in sample.candidates:
        box = " ".join(f"{v:.0f}" for v in c.box)
        numbers = (f"{c.score:.3f}", f"{c.text_score:.3f}", box, _number(c.predicted_iou), _number(c.stability))
        fate = Text(c.rejected.value, "dim") if c.rejected else Text("entity", "bold")
        table.add_row(Text(printable(c.tag)), *numbers, fate)
    verdict = f"{key}  {outcome_text(sample)}  {sample.width} x {sample.height} px"
    source = sample.caption_model and f" ({sample.caption_model})"
    lines = [verdict, sample.caption and f"“{sample.caption}”{source}", sample.url, sample.licence]
    described = [Text(printable(f"{c.tag}: {c.desc}")) for c in sample.candidates if c.desc]
    tables = [table] if sample.candidates else []
    return Group(*(Text(printable(line)) for line in lines if line), *tables, *described, "")


def can_show_pictures() -> bool:
    """Whether a person is at both ends, and the terminal knows its size, because it is asked what it can show."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0


def print_picture(console: Console, sample: Sample) -> None:
    """As large as fits on the screen, in Sixel (iTerm2 too), kitty's protocol, or half-blocks, whichever the terminal
    says it can show."""
    from textual_image.renderable import Image as TerminalImage  # asks the terminal when it is imported

    columns, lines = console.width, max(console.height - _LINES_LEFT, 1)
    picture = draw_sample(sample, (columns * _CELL_PX[0], lines * _CELL_PX[1]))
    console.print(TerminalImage(picture, width="auto", height="auto"), height=lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
