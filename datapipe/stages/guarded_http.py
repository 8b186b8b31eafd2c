"""An opener for `urllib.request.urlopen` that bounds downloads in bytes and seconds and keeps out of private networks.

It acts only in threads that are inside `exchanging`, one download per thread; elsewhere in the process urllib works as
usual. Proxies from the environment are not used, because behind one the address of a connection cannot be checked.
"""

from __future__ import annotations

import functools
import http.client
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
"""The default of img2dataset."""

URL_LENGTH = 8192
"""Longer than servers accept."""

ADDRESSES_TRIED = 4

OPT_OUT_LENGTH = 300

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class BadUrlError(Exception):
    """The URL, or one that it redirects to, cannot be fetched over HTTP."""


class ForbiddenAddressError(Exception):
    """The host has no public address."""


class TooLargeError(Exception):
    """The body is longer than allowed."""


class OptedOutError(Exception):
    """The server's X-Robots-Tag forbids the use."""


@dataclass(frozen=True)
class Limits:
    """What a download may do. `agent`: the name, in lower case, by which an X-Robots-Tag may address us."""

    timeout_s: float
    max_bytes: int
    allow_private_addresses: bool
    respect_opt_outs: bool
    agent: str | None


@dataclass
class Exchange:
    """A download under way, and afterwards what is known of it. `deadline`: seconds on the monotonic clock."""

    limits: Limits
    deadline: float
    status: int | None = None
    retry_after: str = ""
    opt_out: str = ""
    error: Exception | None = None

    def left_s(self) -> float:
        """How long the next operation may take. Raises TimeoutError once the time is up."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, self.limits.timeout_s)

    def arm(self, sock: socket.socket) -> None:
        """Gives the socket's next operation the time that is left."""
        sock.settimeout(self.left_s())


_of_thread = threading.local()


@contextmanager
def exchanging(limits: Limits, deadline: float) -> Iterator[Exchange]:
    """Makes this thread's `urlopen` obey the limits and report to the exchange, until the block ends."""
    urllib.request.install_opener(_opener())
    _of_thread.exchange = exchange = Exchange(limits, deadline)
    try:
        yield exchange
    finally:
        _of_thread.exchange = None


def normal_url(url: str) -> str:
    """The URL in the form that can be sent: blanks and non-ASCII characters quoted, the host in IDNA. Raises
    BadUrlError."""
    url = url.strip()
    if not url:
        raise BadUrlError("no url")
    if len(url) > URL_LENGTH:
        raise BadUrlError(f"a url of {len(url)} characters")
    if re.search(r"[\x00-\x1f\x7f]", url):
        raise BadUrlError("control characters in the url")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https"):
            raise BadUrlError(f"scheme {parts.scheme[:20]!r}; only http and https are fetched")
        if not host:
            raise BadUrlError("no host in the url")
        if "@" in parts.netloc:
            raise BadUrlError("a user name in the url")
        if ":" in host:
            name = f"[{ipaddress.IPv6Address(host)}]"
        else:
            name = host.encode("idna").decode("ascii")
            if not re.fullmatch(r"[a-z0-9._-]+", name):
                raise BadUrlError("characters in the host that no host has")
    except ValueError as error:  # UnicodeError of the idna codec included
        raise BadUrlError(f"malformed: {' '.join(str(error).split())}"[:200]) from None
    netloc = name if port is None else f"{name}:{port}"
    # "%" is kept, so that what is quoted already is not quoted twice.
    return urlunsplit((parts.scheme, netloc, _quoted(parts.path), _quoted(parts.query), ""))


def is_public(address: str) -> bool:
    """Whether an address is on the open internet, even if it is wrapped in an IPv6 transition address."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


def opts_out(headers: Sequence[str], agent: str | None) -> bool:
    """Whether any X-Robots-Tag, `[bot:] directive, [bot:] directive, …`, forbids the use to everyone or to `agent`."""
    for header in headers:
        addressed: str | None = None
        for part in header.lower().split(","):
            before, colon, after = part.partition(":")
            if colon and before.strip() == "unavailable_after":
                continue
            if colon:
                addressed = before.strip()
            directive = (after if colon else part).strip()
            if directive in OPT_OUT_DIRECTIVES and addressed in (None, "*", agent):
                return True
    return False


def _quoted(part: str) -> str:
    return quote(part, safe="%/:=&?~#+!$,;'@()*[]|{}^`\\\"<>")


class _Opener(urllib.request.OpenerDirector):
    # The default timeout is that of urllib, which typeshed does not know.
    def open(self, fullurl: Any, data: Any = None, timeout: Any = socket._GLOBAL_DEFAULT_TIMEOUT) -> Any:  # type: ignore[attr-defined]
        exchange: Exchange | None = getattr(_of_thread, "exchange", None)
        if exchange is None:
            return _plain_opener().open(fullurl, data, timeout)
        try:
            response = super().open(fullurl, data, timeout)
            assert isinstance(response, http.client.HTTPResponse)
            _note(exchange, response)
            return response
        except urllib.error.HTTPError as error:
            exchange.error, exchange.status = error, error.code
            exchange.retry_after = error.headers.get("Retry-After", "") if error.headers else ""
            error.close()
            raise
        except Exception as error:
            exchange.error = error
            raise


def _note(exchange: Exchange, response: http.client.HTTPResponse) -> None:
    exchange.status = response.status
    tags = response.headers.get_all("X-Robots-Tag", [])
    exchange.opt_out = "".join(c for c in ", ".join(tags) if c.isprintable())[:OPT_OUT_LENGTH]
    if exchange.limits.respect_opt_outs and opts_out(tags, exchange.limits.agent):
        response.close()
        raise OptedOutError


@functools.cache
def _opener() -> _Opener:
    opener = _Opener()
    for handler in (
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
        _Http(),
        _Https(),
    ):
        opener.add_handler(handler)
    return opener


@functools.cache
def _plain_opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener()


class _Redirects(urllib.request.HTTPRedirectHandler):
    def http_error_302(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any) -> Any:
        target = headers.get("location") or headers.get("uri")
        if target is not None:
            # http.client reads headers as ISO-8859-1; what servers send is UTF-8.
            normal_url(urljoin(req.full_url, target.encode("latin-1", "replace").decode("utf-8", "replace")))
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_TlsConnection, req, context=_tls_context())


class _Response(http.client.HTTPResponse):
    """Reading it whole stops at the limit; a body that is shorter than announced is an error."""

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return super().read(amt)
        exchange: Exchange = _of_thread.exchange
        try:
            return self._read_whole(exchange.limits.max_bytes)
        except Exception as error:
            exchange.error = error
            raise

    def _read_whole(self, max_bytes: int) -> bytes:
        announced = getattr(self, "length", None)
        if announced is not None and announced > max_bytes:
            raise TooLargeError
        pieces, total = [], 0
        while piece := super().read(1 << 16):
            pieces.append(piece)
            total += len(piece)
            if total > max_bytes:
                raise TooLargeError
        if getattr(self, "length", None):
            raise http.client.IncompleteRead(b"", self.length)
        return b"".join(pieces)


class _Connection(http.client.HTTPConnection):
    response_class = _Response

    def connect(self) -> None:
        self.sock = _connected(self.host, self.port, _of_thread.exchange)


class _TlsConnection(http.client.HTTPSConnection):
    response_class = _Response

    def connect(self) -> None:
        exchange: Exchange = _of_thread.exchange
        sock = _connected(self.host, self.port, exchange)
        try:
            exchange.arm(sock)  # For OpenSSL, this covers the whole handshake.
            wrapped = _tls_context().wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise
        assert isinstance(wrapped, _DeadlineTlsSocket)
        wrapped.exchange = exchange
        self.sock = wrapped


def _connected(host: str, port: int, exchange: Exchange) -> socket.socket:
    """A connection to one of the host's permitted addresses: the one that was checked, without a second lookup."""
    found = _looked_up(host, port, exchange.left_s())
    permitted = [f for f in found if exchange.limits.allow_private_addresses or is_public(str(f[4][0]))]
    if not permitted:
        raise ForbiddenAddressError
    failure: OSError = TimeoutError()
    for family, kind, protocol, _, address in permitted[:ADDRESSES_TRIED]:
        sock = _DeadlineSocket(family, kind, protocol)
        sock.exchange = exchange
        try:
            exchange.arm(sock)
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def _looked_up(host: str, port: int, seconds: float) -> list[Any]:
    """The host's addresses, as of `socket.getaddrinfo`, which knows no timeout: past ours, its thread is left alone to
    give up by itself. Raises what it raises, or TimeoutError."""
    answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


class _DeadlineSocket(socket.socket):
    """Keeps to a deadline; a socket's own timeout starts again with every byte."""

    exchange: Exchange | None = None

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if self.exchange is not None:
            self.exchange.arm(self)
        return super().recv_into(*args, **kwargs)


class _DeadlineTlsSocket(ssl.SSLSocket):
    exchange: Exchange | None = None

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if self.exchange is not None:
            self.exchange.arm(self)
        return super().recv_into(*args, **kwargs)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    # Loading the certificates takes 20 ms: do it once, not once per download.
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = _DeadlineTlsSocket
    return context
