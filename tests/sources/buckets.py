"""A server that speaks S3's and Google Cloud Storage's listings of a bucket of images, and holds none of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        given = {name: values[0] for name, values in parse_qs(asked.query).items()}
        if not asked.path.endswith(("/bucket", "/bucket/", "/o")):  # no object is given out
            self.send_error(404)
            return
        is_s3 = "list-type" in given
        prefix = given.get("prefix", "")
        most = int(given.get("max-keys" if is_s3 else "maxResults", 1000))
        start = int(given.get("continuation-token" if is_s3 else "pageToken", 0))
        count = int(prefix.partition("/")[0] or 0)
        names = [
            f"{count}/{n // 2:09}.{'jpg' if n % 2 == 0 else 'txt'}" for n in range(start, min(start + most, count))
        ]
        following = start + most if start + most < count else None
        body = (_s3 if is_s3 else _gcs)(names, following).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml" if is_s3 else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def _s3(names: list[str], following: int | None) -> str:
    time = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    found = (f"<Contents><Key>{n}</Key><Size>7</Size><ETag>&quot;e&quot;</ETag>{time}</Contents>" for n in names)
    token = f"<NextContinuationToken>{following}</NextContinuationToken>" if following else ""
    truncated = f"<IsTruncated>{'true' if following else 'false'}</IsTruncated>"
    return f"<ListBucketResult><Name>bucket</Name>{truncated}{token}{''.join(found)}</ListBucketResult>"


def _gcs(names: list[str], following: int | None) -> str:
    items = [{"name": n, "size": "7", "etag": "e", "bucket": "bucket"} for n in names]
    return json.dumps(
        {"kind": "storage#objects", "items": items} | ({"nextPageToken": str(following)} if following else {})
    )


@contextmanager
def listing_server() -> Iterator[str]:
    """Its address. The folder `bucket/N` holds N files, every other one an image, and each with a text of its name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
