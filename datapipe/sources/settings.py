"""What a recipe can say about its input."""

from typing import Literal

from datapipe.settings import Settings

Kind = Literal["auto", "table", "img2dataset", "folder"]


class SourceSettings(Settings):
    """Where rows come from, and which columns play which part."""

    kind: Kind = "auto"
    """table: URLs in parquet, csv, tsv, json or jsonl; img2dataset: its WebDataset tars; folder: image files; auto: by
    what the path holds."""
    path: str = ""
    """A file, a folder or a glob; local, s3:// or gs://. The command line's INPUT goes here."""
    url_column: str | None = None
    """Column (or JSON key) of the image's URL; none: recognised by name, as in LAION, DataComp and COYO."""
    alt_text_column: str | None = None
    """Column of the text that came with the image; none: recognised by name."""
    licence_column: str | None = None
    """Column of the licence; none: recognised by name."""
