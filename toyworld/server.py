"""A small web to download from: toy images that are rendered once and served over real HTTP on loopback, with a table
of URLs and the truth about each image."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from rich.progress import track

from datapipe.schema import RLE, SCHEMA_VERSION, Entity, Sample, Tag, to_table
from subject_diffusion.errors import RunError
from subject_diffusion.settings import Settings
from subject_diffusion.storage import whole_folder
from toyworld.render.scene import IDENTITIES_PER_NOUN
from toyworld.render.web import WebImage, render_web_image

TABLE = "urls.parquet"
TRUTH = "truth.parquet"
INDIVIDUALS = "individuals.parquet"


class ToyWebSettings(Settings):
    """The toy web that the default recipe reads."""

    images: int = Field(1000, ge=40)
    """Rows of the URL table; about 15% of them are made to be dropped or to fail."""
    seed: int = Field(0, ge=0)
    """Everything that is drawn follows from it. Webs with different seeds have no individual in common."""
    identities: int = Field(IDENTITIES_PER_NOUN, ge=1, le=IDENTITIES_PER_NOUN)
    """Individuals per noun; the fewer there are, the more images show each."""
    port: int = Field(8642, ge=1, le=65535)
    """Port of the HTTP server on 127.0.0.1. It is fixed because URLs are part of the dataset."""


@dataclass(frozen=True)
class ToyWeb:
    """A rendered toy web. `table`: URLs and alt texts; `truth`: a sidecar with the true caption, boxes and masks of
    each row; `individuals`: which individual each of its subjects is."""

    folder: Path

    @property
    def table(self) -> Path:
        return self.folder / TABLE

    @property
    def truth(self) -> Path:
        return self.folder / TRUTH

    @property
    def individuals(self) -> Path:
        return self.folder / INDIVIDUALS


def web_folder(settings: ToyWebSettings, parent: Path) -> Path:
    """Named after all that decides what is in it, the format of the truth included."""
    drawn = f"{settings.images}-{settings.identities}-{settings.seed}-{settings.port}"
    return parent / f"toyweb-{drawn}-v{SCHEMA_VERSION}"


def render(settings: ToyWebSettings, parent: Path) -> ToyWeb:
    """Renders into a folder of `parent` that is named after the settings; does nothing if it is there."""
    web = ToyWeb(web_folder(settings, parent))
    if web.folder.exists():
        return web
    print(f"rendering {settings.images:,} toy images", flush=True)
    with whole_folder(web.folder) as folder:
        with multiprocessing.get_context("spawn").Pool() as pool:
            drawn = list(
                track(
                    pool.imap(partial(_draw, settings, folder), range(settings.images), chunksize=16),
                    "rendering",
                    settings.images,
                    transient=True,
                    disable=not sys.stdout.isatty(),
                )
            )
        samples, individuals = zip(*drawn, strict=True)
        urls = {"url": [s.url for s in samples], "caption": [s.alt_text for s in samples]}
        pq.write_table(pa.table(urls), folder / TABLE)
        pq.write_table(to_table(samples), folder / TRUTH)
        pq.write_table(pa.table({"names": individuals}), folder / INDIVIDUALS)
    return web


@contextlib.contextmanager
def served(settings: ToyWebSettings, parent: Path) -> Iterator[ToyWeb]:
    """Renders the toy web where it is not there, and serves it on http://127.0.0.1:port until the block ends.

    Raises RunError, before it renders, when the port is taken: by another run, for example, that renders the same web.
    """
    directory = str(web_folder(settings, parent))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", settings.port), partial(_Quiet, directory=directory))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise RunError(f"port {settings.port} is taken; choose another with --set toyworld.port=…") from None
    with server:
        web = render(settings, parent)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield web
        finally:
            server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing, because the fetch stage reports on requests."""


def _draw(settings: ToyWebSettings, folder: Path, row: int) -> tuple[Sample, list[str]]:
    """Writes the image of a row, unless its URL is to be dead. Returns the truth about the row, and its individuals."""
    drawn = render_web_image(row, settings.images, settings.seed, settings.identities)
    name = f"{row:06d}.jpg"
    if drawn.jpeg is not None:
        (folder / name).write_bytes(drawn.jpeg)
    subjects = drawn.scene.subjects if drawn.scene is not None else ()
    individuals = [f"{s.identity.noun} {s.identity.index}" for s in subjects]
    return _truth(row, f"http://127.0.0.1:{settings.port}/{name}", drawn), individuals


def _truth(row: int, url: str, drawn: WebImage) -> Sample:
    sample = Sample(row=row, url=url, alt_text=drawn.alt_text, licence="toy")
    if drawn.scene is None:
        return sample
    subjects = drawn.scene.subjects
    height, width = drawn.scene.image.shape[:2]
    return sample.replace(
        caption=drawn.scene.caption,
        width=width,
        height=height,
        tags=tuple(Tag(s.tag, s.span) for s in subjects),
        candidates=tuple(Entity(s.tag, s.span, s.box, 1.0, 1.0, RLE.of(s.mask)) for s in subjects),
    )
