"""Where rows come from: tables of URLs, images or paths, WebDataset tars, folders of images or videos, datasets of the
Hugging Face hub."""

from datapipe.sources.input_rows import InputRows, open_source, rows_as_input
from datapipe.sources.preview import preview
from datapipe.sources.settings import SourceSettings

__all__ = ["InputRows", "SourceSettings", "open_source", "preview", "rows_as_input"]
