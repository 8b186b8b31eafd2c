"""The code in README.md and docs/, by the mark that stands above each block: `<!-- test: name -->`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from typing import Any

import typer

from sdd.cli import app
from tests.toy import PROJECT

_FENCE = re.compile(
    r"(?P<mark><!-- test: (?P<name>[\w-]+) -->\n)?^(?P<fence>```+)(?P<language>\w*)\n(?P<code>.*?)^(?P=fence)\n",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block. `name`: of its mark, "" without one."""

    document: str
    name: str
    language: str
    code: str

    @property
    def commands(self) -> list[list[str]]:
        """The lines of a shell block as words, without comments; continued lines are one."""
        joined = self.code.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


@cache
def blocks() -> tuple[Block, ...]:
    """Every fenced block of README.md and docs/, in order."""
    documents = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
    return tuple(
        Block(path.name, m["name"] or "", m["language"], m["code"])
        for path in documents
        for m in _FENCE.finditer(path.read_text("utf-8"))
    )


def marked(name: str) -> Block:
    """The block under this mark; there must be one and no more."""
    (found,) = [block for block in blocks() if block.name == name]
    return found


def check_parses(words: list[str]) -> None:
    """That `sdd` would take these words; nothing is run."""
    group: Any = typer.main.get_command(app)
    name, *rest = words
    assert name in group.commands, f"sdd has no command {name}"
    command = group.commands[name]
    command.make_context(name, rest, parent=group.make_context("sdd", [], resilient_parsing=True))
