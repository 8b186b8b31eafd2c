"""A local server that speaks OpenAI's chat completions, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@dataclass
class ChatServer:
    """`answer`: what is done with a question; `models`: the names served, or the status of their list, or
    something that is no list of them; `asked`: all questions so far."""

    answer: Answer
    models: list[str] | list[int] | str | int = field(default_factory=lambda: ["tiny-vl"])
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    @contextmanager
    def served(self) -> Iterator[ChatServer]:
        """On a free port of loopback."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if isinstance(server.models, int):
                return send(self, server.models, {"error": {"message": "no"}})
            if isinstance(server.models, str) or server.models == [1]:
                return send(self, 200, server.models)
            send(self, 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in server.models]})

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(question)
            with suppress(ConnectionError):  # whoever asked may have given up
                server.answer(self, question)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    return Handler


def send(handler: BaseHTTPRequestHandler, status: int, body: object, headers: dict[str, str] | None = None) -> None:
    """One JSON answer."""
    data = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def completion(text: object) -> dict[str, Any]:
    """A chat completion that says `text`."""
    return {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": text}}]}


def drip(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    """A byte now and then, without end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def flood(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    """As many bytes as are taken."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def hang_up(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    """A part of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True
