"""URLs in the one form in which they are compared and sent."""

from __future__ import annotations

import contextlib
import ipaddress
import posixpath
import re
import socket
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import idna

URL_LENGTH = 8192
"""Longer than servers accept."""

_PORTS = {"http": 80, "https": 443}
_HOST_LENGTH, _LABEL_LENGTH = 253, 63
_ESCAPED = re.compile(r"%([0-9a-fA-F]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")


class BadUrlError(Exception):
    """The URL, or one that it redirects to, cannot be fetched over HTTP."""


class Target(NamedTuple):
    """What a normal URL asks of whom. `netloc`: as the Host header names it; `path`: with the query."""

    scheme: str
    host: str
    port: int
    netloc: str
    path: str


def target(normal: str) -> Target:
    parts = urlsplit(normal)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    port = _PORTS[parts.scheme] if parts.port is None else parts.port
    return Target(parts.scheme, parts.hostname or "", port, parts.netloc, path)


def redirected(normal: str, location: str) -> str:
    """The normal URL to which an answer from another one sends us. Raises BadUrlError."""
    try:
        return normal_url(urljoin(normal, location))
    except ValueError as error:
        raise BadUrlError(_malformed(error)) from None


def normal_url(url: str) -> str:
    """The URL in the form that can be sent: blanks and non-ASCII characters quoted; the host in IDNA without a dot at
    its end, or if it is a number, however written, as an address. Raises BadUrlError."""
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
            if "%" in host:
                raise BadUrlError("an address that holds only on one machine")
            address = ipaddress.IPv6Address(host)
            name = str(address.ipv4_mapped or f"[{address}]")
        else:
            name = _host_in_ascii(host)
            with contextlib.suppress(OSError):  # no number
                name = socket.inet_ntoa(socket.inet_aton(name))
        # "%" is kept, so that what is quoted already is not quoted twice.
        path, query = _quoted(parts.path), _quoted(parts.query)
    except ValueError as error:  # UnicodeError, of a name that IDNA does not allow or of a lone surrogate, included
        raise BadUrlError(_malformed(error)) from None
    netloc = name if port is None else f"{name}:{port}"
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def page(normal: str) -> str:
    """What all spellings of a URL have in common, to compare it with others: its host, path and query, escaped only
    where it matters (RFC 3986, 6.2.2), without dots and doubled slashes in the path, whatever the scheme and port."""
    _, host, _, _, asked = target(normal)
    path, mark, query = _ESCAPED.sub(_plainly, asked).partition("?")
    return host + posixpath.normpath(f"/{path.lstrip('/')}") + mark + query


def _plainly(escaped: re.Match[str]) -> str:
    character = chr(int(escaped[1], 16))
    return character if _UNRESERVED.fullmatch(character) else escaped[0].upper()


def _host_in_ascii(host: str) -> str:
    """A name as browsers spell it: mapped by UTS 46, non-transitional (faß.de is not fass.de), then in Punycode. Unlike
    IDNA 2008 proper this lets emoji through, which names have. Raises BadUrlError, UnicodeError."""
    labels = idna.uts46_remap(host, std3_rules=False, transitional=False).removesuffix(".").split(".")
    labels = [label if label.isascii() else f"xn--{label.encode('punycode').decode('ascii')}" for label in labels]
    name = ".".join(labels)
    if len(name) > _HOST_LENGTH or not all(0 < len(label) <= _LABEL_LENGTH for label in labels):
        raise BadUrlError("a host, or a part of it, that is empty or too long")
    if not re.fullmatch(r"[a-z0-9._-]+", name):
        raise BadUrlError("characters in the host that no host has")
    return name


def _malformed(error: ValueError) -> str:
    return f"malformed: {' '.join(str(error).split())}"[:200]


def _quoted(part: str) -> str:
    return quote(part, safe="%/:=&?~#+!$,;'@()*[]|{}^`\\\"<>")
