"""What the page's server refuses before gradio sees it: requests from other sites' pages, and URLs that it would
download for whoever names them."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

from gradio.route_utils import API_PREFIX
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = f"{API_PREFIX}/upload"
MAX_BODY_BYTES = 4 * 2**20
"""The bytes that a request may have which is no upload."""


def guards(host: str) -> list[Middleware]:
    """host: where the page listens."""
    found = [Middleware(NoDownloads)]
    if _is_loopback(host):  # a page of another site may have its name resolved to this machine
        names = [host, "127.0.0.1", "localhost"]
        found.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False))
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class NoDownloads:
    """Refuses files that are named by URL: gradio would download them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Uploads are streamed, and bring their files along.
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] == UPLOAD:
            await self._app(scope, receive, send)
            return
        body = b""
        async for part in Request(scope, receive).stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                await PlainTextResponse("too much", 413)(scope, receive, send)
                return
        if _names_url(body):
            await PlainTextResponse("files come by upload, not by URL", 400)(scope, receive, send)
            return
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(parts, None) or await receive()

        await self._app(scope, again, send)


def _names_url(body: bytes) -> bool:
    """Whether a file's `path` in JSON is a URL, or may be."""
    try:
        waiting: list[Any] = [json.loads(body)]
    except ValueError:
        return False  # gradio takes nothing but JSON
    except RecursionError:
        return True
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "://" in str(one.get("path")):
                return True
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
    return False
