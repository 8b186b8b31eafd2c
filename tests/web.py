"""Toy images on a server of their own, which may be down."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.toy import write_images


class Web:
    """A folder of 0000.jpg, 0001.jpg, … over HTTP. `answer`: the error status for an image, or None for the image."""

    def __init__(self, folder: Path) -> None:
        self.answer: Callable[[int], int | None] = lambda row: None
        self.asked: Counter[str] = Counter()
        web = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked[self.path] += 1
                status = web.answer(int(self.path.removesuffix(".jpg")[1:]))
                if status is None:
                    super().do_GET()
                else:
                    self.send_error(status)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    def table(self, path: Path, rows: range) -> Path:
        """A list of these images, as a parquet file."""
        urls = [f"http://127.0.0.1:{self.server.server_port}/{row:04d}.jpg" for row in rows]
        pq.write_table(pa.table({"url": urls, "caption": [f"text {row}" for row in rows]}), path)
        return path


@contextmanager
def serving_toy_images(folder: Path, count: int) -> Iterator[Web]:
    """At most `count` images: those of them whose URL is not dead."""
    write_images(folder, count)
    for number, image in enumerate(sorted(folder.glob("*.jpg"))):
        image.rename(folder / f"{number:04d}.jpg")
    web = Web(folder)
    threading.Thread(target=web.server.serve_forever, daemon=True).start()
    try:
        yield web
    finally:
        web.server.shutdown()
