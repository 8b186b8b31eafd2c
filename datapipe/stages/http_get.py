"""One GET over HTTP/1.1 at an address that was checked before, bounded in bytes and seconds.

h11 does the framing and knows no sockets, so that every wait is ours and ends at the deadline. Nothing is followed,
decompressed or kept: redirects are answers like others, and a connection serves once. Proxies from the environment are
not used, because behind one the address of a connection cannot be checked.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from datapipe.stages.addresses import Address
from datapipe.stages.byte_budget import Take
from datapipe.stages.urls import Target

HEAD_BYTES = 1 << 16
"""The most that the head of an answer, or the line before a chunk, may take."""

INTERIM_ANSWERS = 16
"""The most answers 1xx before the one that counts."""

CODINGS = frozenset({"br", "compress", "deflate", "gzip", "x-compress", "x-gzip", "zstd"})
"""Encodings of a body that would have to be undone. Other words in Content-Encoding, such as the name of a charset, are
servers' mistakes that leave the image as it is."""


class HttpError(Exception):
    """What came is no answer that can be used."""


class NoHttpError(HttpError):
    """The server speaks something else."""


class FramingError(HttpError):
    """The answer is framed as HTTP/1.1 does not allow."""


class TruncatedError(HttpError):
    """The connection ended before the body did."""


class EncodedError(HttpError):
    """The body is compressed, which was not asked for."""


class TooLargeError(HttpError):
    """The body is longer than allowed."""


@dataclass
class Deadline:
    """`at`: in seconds of the monotonic clock; `step_s`: the longest wait for a connection or for the next bytes;
    `pauses_until`: when the last pause ends, on the same clock."""

    at: float
    step_s: float
    pauses_until: float

    def left_s(self) -> float:
        """How long the next operation may take. Raises TimeoutError once the time is up."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, self.step_s)

    @contextlib.contextmanager
    def paused(self) -> Iterator[float]:
        """Gives how many seconds the block may take at most. They move the deadline."""
        started = time.monotonic()
        try:
            yield self.pauses_until - started
        finally:
            self.at += time.monotonic() - started


def connected(address: Address, deadline: Deadline) -> socket.socket:
    """Raises OSError."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.settimeout(deadline.left_s())
        sock.connect(address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def connected_to_any(addresses: Sequence[Address], deadline: Deadline) -> socket.socket:
    """The first of them that answers. Raises OSError."""
    *others, last = addresses
    for address in others:
        with contextlib.suppress(OSError):
            return connected(address, deadline)
    return connected(last, deadline)


class Exchange:
    """A GET whose answer's head has come. `headers`: names in lower case, values as the server sent them.

    Takes the socket over, and closes it. Raises OSError and HttpError, here and in `body`.
    """

    def __init__(self, sock: socket.socket, target: Target, user_agent: str, deadline: Deadline) -> None:
        # Imported here because the base installation, which reads recipes, is without it.
        import h11

        self._h11: Any = h11
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
        self._deadline = deadline
        self._start = b""
        self._bytes = 0
        self._bytes_allowed = HEAD_BYTES * (INTERIM_ANSWERS + 1)
        self._has_head = False
        self._sock = sock
        try:
            if target.scheme == "https":
                sock.settimeout(deadline.left_s())  # For OpenSSL, this covers the whole handshake.
                self._sock = _tls_context().wrap_socket(sock, server_hostname=target.host)
            self._send(target, user_agent)
            head = self._head()
        except BaseException:
            self._sock.close()
            raise
        self._has_head = True
        self.status = int(head.status_code)
        self.headers = [(name.decode("ascii"), value.decode("utf-8", "replace")) for name, value in head.headers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._sock.close()

    def values(self, name: str) -> list[str]:
        """The values of all headers of that name, given in lower case."""
        return [value for found, value in self.headers if found == name]

    def start_of_body(self, most: int) -> bytes:
        """The body, or as much of it as `most` bytes."""
        self._refuse_compression()
        pieces, total = [], 0
        self._bytes_allowed = self._bytes + 2 * most + HEAD_BYTES
        while total < most and isinstance(event := self._event(), self._h11.Data):
            pieces.append(bytes(event.data))
            total += len(event.data)
        return b"".join(pieces)[:most]

    def body(self, max_bytes: int, take: Take) -> bytes:
        """The whole body. Raises TooLargeError as soon as it is known to be longer, or arrives in more wrapping than
        there could be with chunks of reasonable size. What it holds, it takes before, in pauses of the deadline."""
        self._refuse_compression()
        lengths = [int(length) for length in self.values("content-length")]
        if any(length > max_bytes for length in lengths):
            raise TooLargeError
        if lengths:
            # At once: bodies that were all half there would wait for each other, but for one.
            self._take(take, lengths[0])
        self._bytes_allowed = self._bytes + 2 * max_bytes + HEAD_BYTES
        pieces, total = [], 0
        while isinstance(event := self._event(), self._h11.Data):
            pieces.append(bytes(event.data))
            total += len(event.data)
            if total > max_bytes:
                raise TooLargeError
            if not lengths:
                self._take(take, len(event.data))
        return b"".join(pieces)

    def _take(self, take: Take, length: int) -> None:
        with self._deadline.paused() as most_s:
            take(2 * length, most_s)  # the pieces, and the whole

    def _refuse_compression(self) -> None:
        for coding in ",".join(self.values("content-encoding")).split(","):
            if coding.strip().lower() in CODINGS:
                raise EncodedError(f"Content-Encoding {coding.strip().lower()}, which was not asked for")

    def _send(self, target: Target, user_agent: str) -> None:
        headers = [
            ("Host", target.netloc),
            ("User-Agent", user_agent),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        request = self._http.send(self._h11.Request(method="GET", target=target.path, headers=headers))
        self._http.send(self._h11.EndOfMessage())
        self._sock.settimeout(self._deadline.left_s())
        self._sock.sendall(request)

    def _head(self) -> Any:
        for _ in range(INTERIM_ANSWERS + 1):
            event = self._event()
            if isinstance(event, self._h11.Response):
                if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                    raise FramingError("both Content-Length and Transfer-Encoding")
                return event
        raise FramingError(f"more than {INTERIM_ANSWERS} answers 1xx")

    def _event(self) -> Any:
        ended = False
        try:
            while (event := self._http.next_event()) is self._h11.NEED_DATA:
                self._sock.settimeout(self._deadline.left_s())
                data = self._sock.recv(1 << 16)
                ended = not data
                if ended and not self._has_head:
                    raise ConnectionResetError(errno.ECONNRESET, "closed without an answer")
                self._start = (self._start + data)[:5]
                self._bytes += len(data)
                if self._bytes > self._bytes_allowed:
                    raise TooLargeError
                self._http.receive_data(data)
        except self._h11.RemoteProtocolError as error:
            if self._start != b"HTTP/":
                raise NoHttpError from None
            raise (TruncatedError() if ended else FramingError(str(error))) from None
        return event


@functools.cache
def _tls_context() -> ssl.SSLContext:
    # Loading the certificates takes 20 ms: do it once, not once per download.
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
