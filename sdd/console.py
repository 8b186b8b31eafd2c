"""What the commands share: the argument that names a dataset, and lines for the terminal."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from datapipe.schema import printable

DatasetFolder = Annotated[str, typer.Argument(metavar="PATH", help="A dataset folder: local, s3:// or gs://.")]


def say(text: str) -> None:
    """Prints a line that may hold text of the web, which is not let near the terminal's control codes."""
    Console().print(printable(text), highlight=False, markup=False, soft_wrap=True)
