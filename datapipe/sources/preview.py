"""The first rows of an input as they will be read, for a look before any work starts."""

from __future__ import annotations

from rich.table import Table

from datapipe.schema import Sample, printable
from datapipe.sources.input_rows import InputRows

ROWS = 10
_LONGEST = 120  # characters of a cell


def preview(rows: InputRows) -> Table:
    """A table of the first rows: URL or path, text, license, scores, and the image where it came along."""
    samples = rows.read(0, min(ROWS, rows.rows))
    columns = ["row", "url", "text", *(["license"] if any(s.licence for s in samples) else [])]
    names = sorted({name for sample in samples for name, _ in sample.scores})
    table = Table(*columns, *names, "image", box=None)
    for sample in samples:
        scores = dict(sample.scores)
        cells = [str(sample.row), sample.url, sample.alt_text, *([sample.licence] if "license" in columns else [])]
        cells += [f"{scores[name]:g}" if name in scores else "" for name in names]
        table.add_row(*(_shown(cell) for cell in (*cells, _image(sample))))
    return table


def _image(sample: Sample) -> str:
    if sample.verdict is not None:
        return f"{sample.verdict.outcome.value}: {sample.verdict.detail}"
    return f"{len(sample.image):,} bytes" if sample.image is not None else "to be fetched"


def _shown(text: str) -> str:
    text = printable(text).replace("[", "\\[")  # else rich takes it for markup
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
