"""A page served to one person on this machine, which sends back what was marked."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from datapipe.errors import RunError

_MOST_BYTES = 16 << 20


@contextmanager
def serving(page: str, receive: Callable[[Any], None], port: int = 0) -> Iterator[tuple[str, threading.Event]]:
    """The page's address, and an event that is set when the page says that it is done.

    receive: gets the JSON of every message; a ValueError refuses it. Only who knows the address, which holds a secret,
    is answered, and only under the name 127.0.0.1: no other page of the browser can read or send anything.
    Raises RunError when the port is taken.
    """
    secret, done, lock = secrets.token_urlsafe(16), threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self._trusted(f"/{secret}/"):
                self._answer(200, page.encode(), "text/html; charset=utf-8")

        def do_POST(self) -> None:
            if not self._trusted(f"/{secret}/marks", f"/{secret}/done"):
                return
            length = self.headers.get("Content-Length") or ""
            if self.headers.get("Content-Type") != "application/json" or not length.isdecimal():
                return self._answer(400)
            if int(length) > _MOST_BYTES:
                return self._answer(413)
            try:
                with lock:
                    receive(json.loads(self.rfile.read(int(length))))
            except ValueError:
                return self._answer(400)
            self._answer(204)
            if self.path.endswith("/done"):
                done.set()

        def _trusted(self, *paths: str) -> bool:
            if self.headers.get("Host") == host and self.path in paths:
                return True
            self._answer(404)
            return False

        def _answer(self, status: int, body: bytes = b"", kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)
            if status >= 400:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Nothing: the terminal is the user's."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise RunError(f"port {port} on 127.0.0.1: {error.strerror}; choose another --port") from None
    host = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}/{secret}/", done
    finally:
        server.shutdown()
        server.server_close()
