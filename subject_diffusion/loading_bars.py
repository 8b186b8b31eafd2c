"""Models load without a word: the bars of transformers and diffusers are for those who call these libraries."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Keeps transformers and diffusers from drawing progress bars in this block, or in the function that it decorates.
    Those of downloads stay as they are, because a download may take hours."""
    hub: Any = importlib.import_module("huggingface_hub.utils")
    imported = [name for name in ("transformers", "diffusers") if name in sys.modules]
    libraries = [importlib.import_module(f"{name}.utils.logging") for name in imported]
    drawing = [library for library in libraries if library.is_progress_bar_enabled()]
    # transformers switches those of downloads together with its own.
    keep_downloads = hub.disable_progress_bars if hub.are_progress_bars_disabled() else hub.enable_progress_bars
    for library in drawing:
        library.disable_progress_bar()
    keep_downloads()
    try:
        yield
    finally:
        for library in drawing:
            library.enable_progress_bar()
        keep_downloads()
