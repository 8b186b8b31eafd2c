"""A small web to download from: toy images rendered once, served over real HTTP on loopback, with a URL table and the
truth."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask
from pydantic import Field
from rich.progress import track

from datapipe.errors import RunError
from datapipe.schema import RLE, Entity, Sample, Tag, to_table
from datapipe.settings import Settings
from toyworld.render.scene import IDENTITIES_PER_NOUN
from toyworld.render.web import WebImage, render_web_image

TABLE = "urls.parquet"
TRUTH = "truth.parquet"
INDIVIDUALS = "individuals.parquet"


class ToyWebSettings(Settings):
    """The toy web that the default recipe reads."""

    images: int = Field(1000, ge=40)
    """Rows of the URL table; about 15 % are made to be dropped or to fail."""
    seed: int = Field(0, ge=0)
    """Everything drawn follows from it. Webs of different seeds share no individual."""
    identities: int = Field(IDENTITIES_PER_NOUN, ge=1, le=IDENTITIES_PER_NOUN)
    """Individuals of each noun; the fewer, the more images each is in."""
    port: int = Field(8642, ge=1, le=65535)
    """Of the HTTP server on 127.0.0.1. Fixed, since URLs are part of the dataset."""


@dataclass(frozen=True)
class ToyWeb:
    """A rendered toy web. `table`: URLs and alt texts; `truth`: a sidecar of true captions, boxes and masks, row by
    row; `individuals`: who each of the truth's subjects is."""

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


def render(settings: ToyWebSettings, parent: Path) -> ToyWeb:
    """Renders into a folder of `parent` named after the settings; does nothing when it is there."""
    web = ToyWeb(parent / f"toyweb-{settings.images}-{settings.identities}-{settings.seed}-{settings.port}")
    if web.folder.exists():
        return web
    partial_folder = web.folder.with_name(f"{web.folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool() as pool:
        draw = partial(_draw, settings, partial_folder)
        drawn = list(
            track(
                pool.imap(draw, range(settings.images), chunksize=16),
                "rendering the toy world",
                settings.images,
                transient=True,
            )
        )
    samples, individuals = zip(*drawn, strict=True)
    urls = {"url": [s.url for s in samples], "caption": [s.alt_text for s in samples]}
    pq.write_table(pa.table(urls), partial_folder / TABLE)
    pq.write_table(to_table(samples), partial_folder / TRUTH)
    pq.write_table(pa.table({"names": individuals}), partial_folder / INDIVIDUALS)
    partial_folder.rename(web.folder)
    return web


@contextlib.contextmanager
def served(settings: ToyWebSettings, parent: Path) -> Iterator[ToyWeb]:
    """The toy web on http://127.0.0.1:port until the block ends."""
    web = render(settings, parent)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", settings.port), partial(_Quiet, directory=str(web.folder)))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise RunError(f"port {settings.port} is taken; choose another with --set toyworld.port=…") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Requests are the fetch stage's to report."""


def _draw(settings: ToyWebSettings, folder: Path, row: int) -> tuple[Sample, list[str]]:
    """Writes the image of a row, unless its URL is to be dead, and returns the row's truth and its individuals."""
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
        candidates=tuple(Entity(s.tag, s.span, s.box, 1.0, 1.0, _rle(s.mask)) for s in subjects),
    )


def _rle(mask: np.ndarray) -> RLE:
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return RLE((int(mask.shape[0]), int(mask.shape[1])), encoded["counts"].decode("ascii"))
