"""A page served to one person on this machine, which sends back what was marked."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from subject_diffusion.errors import RunError

_MOST_BYTES = 16 << 20


@contextmanager
def served(
    page: Callable[[], str], receive: Callable[[Any], Any], port: int = 0
) -> Iterator[tuple[str, threading.Event]]:
    """The page's address, and an event that is set when the page says that it is done.

    page: gives the page anew for every request. receive: gets the JSON of every message, and what it returns is the
    answer, in JSON; a ValueError refuses the message. Neither is called twice at a time. Only who knows the address,
    which holds a secret, is answered, and only under the name 127.0.0.1: no other page of the browser can read or send
    anything.
    Raises RunError when the port is taken.
    """
    try:
        server = _PageServer(page, receive, port)
    except OSError as error:
        raise RunError(f"port {port} on 127.0.0.1: {error.strerror}; choose another --port") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{server.host}{server.path}", server.done
    finally:
        server.shutdown()
        server.server_close()


class _PageServer(ThreadingHTTPServer):
    """`host`: the only name that it answers to; `path`: the page's, with the secret in it."""

    def __init__(self, page: Callable[[], str], receive: Callable[[Any], Any], port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.path = f"/{secrets.token_urlsafe(16)}/"
        self.done = threading.Event()
        self._page, self._receive, self._lock = page, receive, threading.Lock()

    def page(self) -> bytes:
        with self._lock:
            return self._page().encode()

    def receive(self, message: bytes) -> bytes:
        """The answer. Raises ValueError for what is no message."""
        with self._lock:
            return json.dumps(self._receive(json.loads(message))).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    """Seconds for which a connection may say nothing."""
    server: _PageServer

    def do_GET(self) -> None:
        if self._is_trusted(""):
            self._answer(200, self.server.page(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if not self._is_trusted("marks", "done"):
            return
        length = self.headers.get("Content-Length") or ""
        if self.headers.get("Content-Type") != "application/json" or not length.isdecimal():
            return self._answer(400)
        if int(length) > _MOST_BYTES:
            return self._answer(413)
        try:
            answer = self.server.receive(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return self._answer(400)
        self._answer(200, answer, "application/json")
        if self.path.endswith("/done"):
            self.server.done.set()

    def _is_trusted(self, *names: str) -> bool:
        """Whether the request is for one of these names below the secret path; if not, it is answered."""
        # Only a page of another place says of itself where it is from.
        own = self.headers.get("Origin") in (None, f"http://{self.server.host}")
        named = self.headers.get("Host") == self.server.host
        if own and named and self.path in [self.server.path + name for name in names]:
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
        """Says nothing: the terminal is the user's."""
