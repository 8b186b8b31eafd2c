"""Answers of hostile and broken web servers, each with the verdict that it ends in."""

from __future__ import annotations

import gzip
import itertools
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

from datapipe.schema import Reason

IMAGE = b"\xff\xd8 an image, as far as fetching goes \xff\xd9"
MAX_BYTES = 1_000_000
OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"Content-Length: %d\r\n\r\n%s" % (len(IMAGE), IMAGE)
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
LINE = b"X-Filler: " + b"x" * 1000 + b"\r\n"
PIECE = b"x" * (1 << 16)

Answer = Callable[["Handler"], None]


class Case(NamedTuple):
    name: str
    answer: bytes | Answer
    reason: Reason | None
    status: int | None = None


def drip(start: bytes, piece: bytes = b"x") -> Answer:
    """A piece every 20 ms, for ever."""
    return lambda to: to.send(itertools.chain([start], _each(piece, 0.02)))


def flood(start: bytes, piece: bytes = PIECE) -> Answer:
    """As fast as it can, for ever."""
    return lambda to: to.send(itertools.chain([start], itertools.repeat(piece)))


def stall(start: bytes) -> Answer:
    """Nothing further, and the connection stays open."""
    return lambda to: to.send(itertools.chain([start], _each(b"", 0.05)))


def redirect(location: bytes, code: int = 302) -> bytes:
    return b"HTTP/1.1 %d Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (code, location)


def sized(length: bytes, body: bytes = IMAGE) -> bytes:
    return OK + b"Content-Length: " + length + b"\r\n\r\n" + body


def coded(coding: bytes) -> bytes:
    body = gzip.compress(bytes(100_000))
    return OK + b"Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n%s" % (coding, len(body), body)


def _each(piece: bytes, seconds: float) -> Iterator[bytes]:
    while True:
        time.sleep(seconds)
        yield piece


UNREACHABLE, FRAMING, BAD_URL = Reason.UNREACHABLE, Reason.BAD_FRAMING, Reason.BAD_URL
TIMEOUT, TOO_LARGE, STATUS = Reason.TIMEOUT, Reason.TOO_LARGE, Reason.HTTP_STATUS
CODING, FORBIDDEN = Reason.CONTENT_ENCODING, Reason.FORBIDDEN_ADDRESS

CASES = [
    # no HTTP, or none that goes on
    Case("closes", b"", UNREACHABLE),
    Case("ssh", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", UNREACHABLE),
    Case("smtp", b"220 mail.example ESMTP\r\n\r\n", UNREACHABLE),
    Case("http-0.9", b"<html>hello</html>\r\n\r\n", UNREACHABLE),
    Case("icy", b"ICY 200 OK\r\nicy-name: radio\r\n\r\n", UNREACHABLE),
    Case("tls-alert", b"\x15\x03\x03\x00\x02\x02\x46\r\n\r\n", UNREACHABLE),
    Case("http2-only", b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64\r\n\r\n", UNREACHABLE),
    Case("nul-bytes", bytes(5000) + b"\r\n\r\n", UNREACHABLE),
    Case("flood-without-a-line", flood(b""), UNREACHABLE),
    Case("half-a-status-line", b"HTTP/1.1 20", UNREACHABLE),
    Case("half-a-head", OK + b"Content-Le", UNREACHABLE),
    # the status line
    Case("status-of-two-digits", b"HTTP/1.1 20 OK\r\n\r\n", FRAMING),
    Case("status-of-four-digits", b"HTTP/1.1 2000 OK\r\n\r\n", FRAMING),
    Case("status-zero", b"HTTP/1.1 000 OK\r\n\r\n", FRAMING),
    Case("status-below-zero", b"HTTP/1.1 -20 OK\r\n\r\n", FRAMING),
    Case("status-in-words", b"HTTP/1.1 OK\r\n\r\n", FRAMING),
    Case("status-999", b"HTTP/1.1 999 Request denied\r\nContent-Length: 0\r\n\r\n", STATUS, 999),
    Case("http-9", b"HTTP/9 200 OK\r\n\r\n", FRAMING),
    Case("http-1-in-lower-case", b"http/1.1 200 OK\r\n\r\n", UNREACHABLE),
    Case("endless-status-line", flood(b"HTTP/1.1 200 "), FRAMING),
    # the head
    Case("endless-header", flood(OK + b"X-Endless: "), FRAMING),
    Case("endless-headers", flood(OK, LINE), FRAMING),
    Case("dripping-status-line", drip(b"HTTP/1.1 200 "), TIMEOUT),
    Case("dripping-header", drip(OK + b"X-Endless: "), TIMEOUT),
    Case("dripping-headers", drip(OK, b"X: y\r\n"), TIMEOUT),
    Case("stalls-at-once", stall(b""), TIMEOUT),
    Case("stalls-in-the-head", stall(OK), TIMEOUT),
    Case("header-without-colon", OK + b"nonsense\r\n\r\n", FRAMING),
    Case("header-with-nul", OK + b"X: a\x00b\r\n\r\n", FRAMING),
    Case("header-name-with-blank", OK + b"Content Length: 5\r\n\r\nabcde", FRAMING),
    Case("blank-before-colon", OK + b"Content-Length : 5\r\n\r\nabcde", FRAMING),
    Case("folded-first-header", OK + b" folded\r\n\r\n", FRAMING),
    # answers before the answer
    Case("continue-first", b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE, None, 200),
    Case("early-hints-first", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 3 + WHOLE, None, 200),
    Case("flood-of-continues", flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), FRAMING),
    Case("dripping-continues", drip(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 4), FRAMING),
    Case("switching-protocols", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", FRAMING),
    # Content-Length
    Case("length-below-zero", sized(b"-1"), FRAMING),
    Case("length-with-plus", sized(b"+5"), FRAMING),
    Case("length-in-hex", sized(b"0x20"), FRAMING),
    Case("length-in-words", sized(b"many"), FRAMING),
    Case("length-of-1000-digits", sized(b"9" * 1000), FRAMING),
    Case("length-twice-unlike", OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", FRAMING),
    Case("length-listed-unlike", sized(b"1, 2"), FRAMING),
    Case("length-twice-alike", OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nab", None, 200),
    Case("length-of-1-tb", sized(b"1000000000000"), TOO_LARGE, 200),
    Case("longer-than-sent", sized(b"1000"), UNREACHABLE, 200),
    Case("sent-longer-than-said", sized(b"%d" % len(IMAGE), IMAGE + PIECE), None, 200),
    Case("empty", sized(b"0", b""), Reason.EMPTY_BODY, 200),
    # Transfer-Encoding
    Case("length-and-chunks", OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", FRAMING),
    Case("encoding-unknown", OK + b"Transfer-Encoding: rot13\r\n\r\nabc", FRAMING),
    Case("encoding-gzip", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", FRAMING),
    Case("chunk-below-zero", flood(CHUNKED + b"-1\r\n"), FRAMING, 200),
    Case("chunk-far-below-zero", flood(CHUNKED + b"-ffffffff\r\n"), FRAMING, 200),
    Case("chunk-with-plus", CHUNKED + b"+5\r\nabcde\r\n0\r\n\r\n", FRAMING, 200),
    Case("chunk-with-0x", CHUNKED + b"0x5\r\nabcde\r\n0\r\n\r\n", FRAMING, 200),
    Case("chunk-with-underscore", CHUNKED + b"1_0\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n", FRAMING, 200),
    Case("chunk-in-words", CHUNKED + b"five\r\nabcde\r\n", FRAMING, 200),
    Case("chunk-without-size", CHUNKED + b"\r\nabcde\r\n", FRAMING, 200),
    Case("chunk-of-2-to-the-79", flood(CHUNKED + b"f" * 20 + b"\r\n"), TOO_LARGE, 200),
    Case("chunk-of-1000-digits", CHUNKED + b"f" * 1000 + b"\r\n", FRAMING, 200),
    Case("chunk-longer-than-said", CHUNKED + b"2\r\nabcde\r\n0\r\n\r\n", FRAMING, 200),
    Case("chunk-cut-off", CHUNKED + b"ff\r\nshort", UNREACHABLE, 200),
    Case("chunks-without-end", CHUNKED + b"5\r\nabcde\r\n", UNREACHABLE, 200),
    Case("endless-chunk-line", flood(CHUNKED + b"5;"), FRAMING, 200),
    Case("endless-chunks", flood(CHUNKED, b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n"), TOO_LARGE, 200),
    Case("endless-wrapping", flood(CHUNKED, b"1;" + b"y" * 60_000 + b"\r\nx\r\n"), TOO_LARGE, 200),
    Case("endless-trailers", flood(CHUNKED + b"0\r\n", LINE), FRAMING, 200),
    Case("dripping-chunks", drip(CHUNKED, b"1\r\nx\r\n"), TIMEOUT, 200),
    # the body
    Case("endless-body", flood(OK + b"\r\n"), TOO_LARGE, 200),
    Case("dripping-body", drip(sized(b"100000")), TIMEOUT, 200),
    Case("stalling-body", stall(sized(b"1000")), TIMEOUT, 200),
    Case("gzip-bomb", coded(b"gzip"), CODING, 200),
    Case("brotli", coded(b"br"), CODING, 200),
    Case("coded-twice", coded(b"identity, GZIP"), CODING, 200),
    Case("charset-as-coding", OK + b"Content-Encoding: UTF-8\r\nContent-Length: 2\r\n\r\nab", None, 200),
    Case("no-content", b"HTTP/1.1 204 No Content\r\n\r\n", Reason.EMPTY_BODY, 204),
    Case("not-modified", b"HTTP/1.1 304 Not Modified\r\n\r\n", STATUS, 304),
    Case("http-1.0-until-it-closes", b"HTTP/1.0 200 OK\r\n\r\n" + IMAGE, None, 200),
    Case("bare-line-feeds", b"HTTP/1.1 200 OK\nContent-Length: 2\n\nab", None, 200),
    # redirects
    Case("to-itself", redirect(b"/to-itself"), STATUS, 302),
    Case("to-nothing", redirect(b""), STATUS, 302),
    Case("without-target", b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\n\r\n", STATUS, 301),
    Case("to-a-file", redirect(b"file:///etc/passwd"), BAD_URL),
    Case("to-gopher", redirect(b"gopher://127.0.0.1:6379/_FLUSHALL", 307), BAD_URL),
    Case("to-javascript", redirect(b"javascript:alert(1)"), BAD_URL),
    Case("to-data", redirect(b"data:image/png;base64,AAAA"), BAD_URL),
    Case("to-a-broken-host", redirect(b"http://[::1/"), BAD_URL),
    Case("to-a-port-out-of-range", redirect(b"http://example.com:99999/"), BAD_URL),
    Case("to-user-and-password", redirect(b"http://user:word@example.com/"), BAD_URL),
    Case("to-10000-characters", redirect(b"/" + b"a" * 10_000, 308), BAD_URL),
    Case("to-an-image-with-endless-body", flood(redirect(b"/whole")), None, 200),
    Case("dripping-redirect", drip(b"HTTP/1.1 302 Found\r\nLocation: /", b"a"), TIMEOUT),
    # pauses asked for
    Case(
        "after-the-end-of-time", b"HTTP/1.1 503 x\r\nRetry-After: Fri, 31 Dec 9999 23:59:59 -1200\r\n\r\n", STATUS, 503
    ),
    Case("after-nonsense", b"HTTP/1.1 503 x\r\nRetry-After: -1e999\r\n\r\n", STATUS, 503),
]


class Handler(socketserver.BaseRequestHandler):
    """Answers /name as the case of that name does, and /whole with an image."""

    answers: ClassVar[dict[str, bytes | Answer]] = {"whole": WHOLE, **{case.name: case.answer for case in CASES}}
    sent: ClassVar[Counter[str]] = Counter()
    """Bytes, by the case's name."""

    def handle(self) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += self.request.recv(65536)
        self.name = request.split()[1].decode().strip("/")
        answer = self.answers.get(self.name, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        try:
            self.send([answer]) if isinstance(answer, bytes) else answer(self)
            self.request.shutdown(socket.SHUT_WR)
            self.request.recv(65536)  # so that closing does not reset what is under way
        except OSError:
            pass  # the client has had enough

    def send(self, pieces: Iterator[bytes] | list[bytes]) -> None:
        until = time.monotonic() + 20
        for piece in pieces:
            self.request.settimeout(max(until - time.monotonic(), 0.01))
            self.request.sendall(piece)
            self.sent[self.name] += len(piece)
            if self.request in self.server.gone(self.request):  # type: ignore[attr-defined]
                return


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def gone(self, sock: socket.socket) -> list[socket.socket]:
        """The socket, if its client has hung up."""
        sock.setblocking(False)
        try:
            return [sock] if not sock.recv(1) else []
        except BlockingIOError:
            return []
        except OSError:
            return [sock]


@contextmanager
def hostile_server() -> Iterator[str]:
    with _Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
