"""How owners say that their images are not to be taken: X-Robots-Tag, robots.txt, and lists of domains and URLs."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datapipe.stages.urls import BadUrlError, normal_url, page, target
from subject_diffusion.errors import RecipeError
from subject_diffusion.storage import file_system, named_errors

OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
"""Those that img2dataset honors."""

_WITH_VALUES = frozenset({"max-image-preview", "max-snippet", "max-video-preview", "unavailable_after"})
_BOT = re.compile(r"[a-z0-9_-]+|\*")

ROBOTS_TXT_S = 24 * 3600.0
"""How long a robots.txt is good for, as RFC 9309 says."""

ROBOTS_TXT_RETRY_S = 300.0
"""How soon a host is asked again that did not tell."""

ROBOTS_TXT_BYTES = 500 * 1024
"""The most of it that is read, as RFC 9309 says."""

CACHED_HOSTS = 10_000
CACHED_BYTES = 8 << 20
"""How many robots.txt files are kept, and their bytes. Parsed, they take up to 30 times as much."""


def opts_out(headers: Sequence[str], agent: str | None) -> bool:
    """Whether any X-Robots-Tag, `[bot:] directive, [bot:] directive, …`, forbids the use to everyone or to `agent`."""
    for header in headers:
        addressed: str | None = None
        for part in header.lower().split(","):
            before, colon, after = part.partition(":")
            name = before.strip()
            if colon and (name in _WITH_VALUES or not _BOT.fullmatch(name)):
                continue  # a directive with a value, or the rest of a date with a comma: neither names a bot
            if colon:
                addressed = name
            directive = (after if colon else part).strip()
            if directive in OPT_OUT_DIRECTIVES and addressed in (None, "*", agent):
                return True
    return False


class RobotsTxtError(Exception):
    """The host does not say what its robots.txt allows."""


class Blocklist:
    """Domains, with all below them, and URLs that are never asked.

    lines: a domain or a URL each; blank ones and those after "#" say nothing. Raises RecipeError.
    """

    def __init__(self, lines: Iterable[str], name: str) -> None:
        domains, urls = set(), set()
        for number, line in enumerate(lines, 1):
            entry = line.partition(" #")[0].strip()
            if not entry or entry.startswith("#"):
                continue
            try:
                if "://" in entry:
                    urls.add(page(normal_url(entry)))
                elif "/" in entry:
                    raise BadUrlError("a URL without its scheme, or more than a domain")
                else:
                    domains.add(target(normal_url(f"http://{entry}/")).host)
            except BadUrlError as error:
                raise RecipeError(f"fetch.blocklist {name}, line {number}: {error}") from None
        self._domains, self._urls = frozenset(domains), frozenset(urls)

    @classmethod
    def read(cls, path: str) -> Blocklist:
        """From a file or a bucket. Raises RecipeError."""
        fs, inner = file_system(path, RecipeError, "fetch.blocklist")
        with named_errors(f"fetch.blocklist {path}", RecipeError), fs.open(inner, "r", encoding="utf-8-sig") as file:
            try:
                return cls(file, path)
            except UnicodeDecodeError:
                raise RecipeError(f"fetch.blocklist {path}: no text in UTF-8; save it as such") from None

    def holds(self, url: str) -> bool:
        """url: in its normal form."""
        labels = target(url).host.split(".")
        return page(url) in self._urls or any(".".join(labels[first:]) in self._domains for first in range(len(labels)))


class RobotsTxt:
    """What the robots.txt of each host allows us.

    agent: the name by which it may address us.
    read: (URL, monotonic time at which to give up) -> its status, 503 if there is none, and text. Raises TimeoutError.
    """

    def __init__(self, agent: str, read: Callable[[str, float], tuple[int, str]]) -> None:
        self._agent = agent
        self._read = read
        self._lock = threading.Lock()
        self._hosts: dict[str, _OfHost] = {}
        self._bytes = 0

    def allows(self, url: str, until: float) -> bool:
        """Asks each host once in `ROBOTS_TXT_S`, one thread for all that want to know. As RFC 9309 says, a host that
        has none (4xx) allows everything, and one that fails to tell (5xx) nothing; so does one that asks for a pause
        (429). Raises RobotsTxtError of the latter two, TimeoutError if `until` has come."""
        scheme, _, _, netloc, _ = target(url)
        with self._lock:
            if len(self._hosts) >= CACHED_HOSTS or self._bytes > CACHED_BYTES:
                self._hosts.clear()
                self._bytes = 0
            of_host = self._hosts.setdefault(f"{scheme}://{netloc}", _OfHost())
        if not of_host.lock.acquire(timeout=max(until - time.monotonic(), 0)):
            raise TimeoutError
        try:
            if of_host.expires < time.monotonic():
                status, text = self._read(f"{scheme}://{netloc}/robots.txt", until)
                with self._lock:
                    self._bytes += len(text)
                fails = status == 429 or status >= 500
                of_host.rules = None if fails else _parsed(text if status < 300 else "")
                of_host.expires = time.monotonic() + (ROBOTS_TXT_RETRY_S if fails else ROBOTS_TXT_S)
            if of_host.rules is None:
                raise RobotsTxtError
            return bool(of_host.rules.can_fetch(url, self._agent))
        finally:
            of_host.lock.release()


class _OfHost:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.expires = 0.0
        self.rules: Any = None


def _parsed(text: str) -> Any:
    # Imported here because the base installation, which reads recipes, is without it. Not urllib.robotparser: it knows
    # no wildcards, and "Disallow: /*.jpg$" would allow everything.
    from protego import Protego

    return Protego.parse(text)
