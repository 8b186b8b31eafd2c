"""Results side by side: only what was measured alike, with what the numbers can be read by."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Group
from rich.table import Table

from datapipe.inspect.pages import html_page
from subject_diffusion.errors import RunError
from subject_diffusion.settings import leaves
from train.benchmark.result import Means, Result, cluster_mean
from train.evaluation.pictures import open_picture
from train.evaluation.report import Mean

PUBLISHED = Path(__file__).parent / "published.yaml"
CEILING = "real photographs"
COPIED = "the reference, copied"
THUMBNAIL_PX = 192
PAIRED = {"all": "all photographs of the subject", "reference": "the reference alone"}
MOST_ROWS = 120
"""The most rows of pictures on a page, spread evenly over all."""

HIDDEN = ("asked", "labels")
"""What is left out of how pictures were drawn: hashes and settings that are compared, and say little to a reader."""

Cells = tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A table with a title: heads, and rows of as many cells."""

    title: str
    heads: Cells
    rows: list[Cells]


def check_alike(results: Sequence[tuple[str, Result]]) -> None:
    """Raises RunError with the first difference in how two results were measured. results: with the name of each."""
    (first_name, first), *others = results
    for name, other in others:
        before, now = (dict(leaves(r.measured)) for r in (first, other))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise RunError(
                    f"{first_name} and {name} were not measured alike: {key} is {before.get(key)} in the one and "
                    f"{now.get(key)} in the other"
                )
        if len(other.images) != len(first.images):
            raise RunError(
                f"{first_name} and {name} were not measured alike: {len(first.images):,} pictures in the one and "
                f"{len(other.images):,} in the other"
            )


def blocks(results: Sequence[tuple[str, Result]]) -> list[Block]:
    """Overall, how each was drawn, and published figures; of several results, the differences too."""
    named = list(zip(_names(results), (result for _, result in results), strict=True))
    first = named[0][1]
    metrics = list(first.overall)
    columns: list[tuple[str, Means]] = [(name, r.overall) for name, r in named]
    columns += [(CEILING, first.ceiling), (COPIED, first.copied)]
    overall = [(m, *(_cell(means.get(m)) for _, means in columns)) for m in metrics]
    found = [Block(_title(first), ("measure", *(name for name, _ in columns)), overall)]
    if len(named) > 1:
        heads = ("measure", *(f"{name} over {named[0][0]}" for name, _ in named[1:]))
        found.append(
            Block("Difference, picture by picture", heads,
                  [(m, *(_cell(difference(first, r, m)) for _, r in named[1:])) for m in metrics])
        )  # fmt: skip
    found.append(_drawn(named))
    published = [row for row in yaml.safe_load(PUBLISHED.read_text("utf-8")) if row["suite"] == first.suite]
    if published:
        measures = [m for m in ("dino", "clip_i", "face", "clip_t") if any(m in row for row in published)]
        cells = [
            (r["model"], *(f"{r[m]:.3f}" if m in r else "" for m in measures), r["backbones"], r["source"])
            for r in published
        ]
        found.append(
            Block("Published, each with its own backbones", ("model", *measures, "backbones", "source"), cells)
        )
    return found


def difference(first: Result, other: Result, metric: str) -> Mean | None:
    """How much more the other has, picture by picture; the bootstrap draws subjects, as that of the means does."""
    pairs = [
        (a["group"], b["scores"][metric] - a["scores"][metric])
        for a, b in zip(first.images, other.images, strict=True)
        if metric in a["scores"] and metric in b["scores"]
    ]
    return cluster_mean(np.array([d for _, d in pairs]), [group for group, _ in pairs]) if pairs else None


def terminal(results: Sequence[tuple[str, Result]]) -> Group:
    """For the terminal."""
    shown = []
    for block in blocks(results):
        table = Table(*block.heads, title=block.title, title_justify="left", box=None)
        for row in block.rows:
            table.add_row(*row)
        shown.append(table)
    return Group(*shown)


def markdown(results: Sequence[tuple[str, Result]]) -> str:
    """The same tables as Markdown."""
    lines: list[str] = []
    for block in blocks(results):
        lines += [f"## {block.title}", "", _line(block.heads), _line(["---"] * len(block.heads))]
        lines += [*(_line(row) for row in block.rows), ""]
    return "\n".join(lines)


def page(results: Sequence[tuple[str, Result]], folders: Sequence[Path]) -> str:
    """The same tables as a page, and the pictures side by side. folders: of each result."""
    return html_page(
        "comparison",
        scripts=(),
        names=_names(results),
        blocks=blocks(results),
        pictures=list(_rows(results, folders)),
    )


def folder_of(path: Path) -> Path:
    """The folder of a result that was named so: its pictures are found from there."""
    return path if path.is_dir() else path.parent


def _names(results: Sequence[tuple[str, Result]]) -> list[str]:
    """Their own where these tell all of them apart, else where they were read from."""
    own = [result.name or path for path, result in results]
    return own if len(set(own)) == len(own) else [path for path, _ in results]


def _rows(results: Sequence[tuple[str, Result]], folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """A row per prompt, with the first picture of each result."""
    firsts = [number for number, image in enumerate(results[0][1].images) if image["index"] == 0]
    for number in firsts[:: -(-len(firsts) // MOST_ROWS)]:
        images = [result.images[number] for _, result in results]
        yield {
            "group": images[0]["group"],
            "prompt": images[0]["prompt"],
            "pictures": [
                {"data": _thumbnail(folder / image["file"]), "scores": _scores(image["scores"])}
                for folder, image in zip(folders, images, strict=True)
            ],
        }


def _thumbnail(path: Path) -> str | None:
    """As a data URL; None where the picture is no longer there, or damaged."""
    if not path.is_file():
        return None
    try:
        image = open_picture(path).convert("RGB")
    except RunError:
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode("ascii")


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def _title(result: Result) -> str:
    protocol = result.measured["protocol"]
    return (
        f"{result.suite}: {len(protocol['groups'])} × {protocol['prompts'] // len(protocol['groups'])} prompts × "
        f"{protocol['images_per_prompt']} pictures, compared with {PAIRED[result.measured['pairing']]}"
    )


def _drawn(named: Sequence[tuple[str, Result]]) -> Block:
    every = [dict(leaves({**r.drawn, **r.backbones})) for _, r in named]
    keys = dict.fromkeys(key for found in every for key in found if key.partition(".")[0] not in HIDDEN)
    rows: list[Cells] = [(key, *(_said(found.get(key)) for found in every)) for key in keys]
    return Block("How they were drawn, and the backbones", ("", *(name for name, _ in named)), rows)


def _said(value: Any) -> str:
    return "" if value is None else str(value)


def _cell(mean: Mean | None) -> str:
    return "" if mean is None else str(mean)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
