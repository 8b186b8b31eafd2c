"""A local server that plays the model hub: repositories with revisions, private and gated ones, and its error codes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Repository:
    """`revisions`: the commit that each branch or tag stands for; `commits`: the folder of each commit."""

    revisions: dict[str, str]
    commits: dict[str, Path]
    gated: bool = False


@dataclass
class Hub:
    """`asked`: the paths of all requests; `broken`: a status with which everything is answered."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: int | None = None
    url: str = ""

    @contextmanager
    def served(self) -> Iterator[Hub]:
        """The hub on a free port of loopback."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            hub.asked.append(self.path)
            if hub.broken is not None:
                return self._refuse(hub.broken, None)
            parts = self.path.partition("?")[0].strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if is_api else parts[:2])
            repository = hub.repositories.get(name)
            if repository is None:
                return self._refuse(401, "RepoNotFound")
            after = parts[4:] if is_api else parts[2:]  # revision/NAME, tree/NAME, resolve/NAME/PATH, or nothing: main
            revision, rest = after[1] if len(after) > 1 else "main", after[2:]
            commit = repository.revisions.get(revision, revision)
            if commit not in repository.commits:
                return self._refuse(404, "RevisionNotFound")
            folder = repository.commits[commit]
            if is_api:
                files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
                about: object = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
                if after[:1] == ["tree"]:
                    sizes = {f: (folder / f).stat().st_size for f in files}
                    about = [{"type": "file", "path": f, "size": sizes[f], "oid": commit} for f in files]
                return self._send(json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
            if repository.gated:
                return self._refuse(403, "GatedRepo")
            path = folder.joinpath(*rest)
            if not path.is_file():
                return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            data = path.read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            return self._send(data, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}, body)

        def _refuse(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in ({"X-Error-Code": code} if code else {} | (headers or {})).items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    return Handler
