"""Where rows come from: URL tables, img2dataset's tars, folders of images."""

from datapipe.sources.settings import SourceSettings
from datapipe.sources.source import Source, open_source

__all__ = ["Source", "SourceSettings", "open_source"]
