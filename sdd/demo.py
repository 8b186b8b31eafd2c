"""The command that opens a page in the browser: arguments in, one call."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer

from sdd.training import DEFAULT_MODEL, LABELS, quieten
from subject_diffusion._extras import require
from subject_diffusion.errors import RunError


def demo(
    model: Annotated[
        Path | None,
        typer.Argument(
            help=f"A run of `sdd train`, one of its checkpoints, or a pipeline: its folder. {DEFAULT_MODEL}",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 7860,
    labels: Annotated[
        Path, typer.Option(help="Recipe (a file or a name) whose detector and segmenter cut references out.")
    ] = LABELS,
) -> None:
    """Opens a page on which a subject is cut out, placed and drawn."""
    require("page")

    from datapipe.recipe import load_recipe
    from train.sampling.trained import default_model, find_model

    model = model or default_model()
    find_model(model)
    finder = load_recipe(labels)
    _check_free(host, port)
    with tempfile.TemporaryDirectory(prefix="sdd-demo-") as scratch:
        os.environ["GRADIO_TEMP_DIR"] = scratch  # read when gradio is imported: what is uploaded ends with the page

        from train.sampling.page.app import served
        from train.sampling.page.studio import Studio

        quieten()
        with served(Studio(model, finder, Path(scratch)), host, port) as address:
            print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()


def _check_free(host: str, port: int) -> None:
    """Raises RunError where the page could not be served."""
    with contextlib.closing(socket.socket()) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            said = error.strerror or error
            raise RunError(f"{host}:{port}: {said}; choose another with --host and --port") from None
