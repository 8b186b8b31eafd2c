"""A local server that plays the hub: models and datasets with revisions, private and gated ones, and its errors."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote


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


def _entry(folder: Path, path: Path, commit: str) -> list[dict[str, object]]:
    if not path.exists():
        return []
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return [{"type": "directory", "path": name, "size": 0, "oid": commit}]
    return [{"type": "file", "path": name, "size": path.stat().st_size, "oid": commit}]


def _entries(folder: Path, below: str, recursive: bool, commit: str) -> list[dict[str, object]]:
    paths = sorted((folder / below).rglob("*") if recursive else (folder / below).iterdir())
    return [entry for path in paths for entry in _entry(folder, path, commit)]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_POST(self) -> None:
            self._answer(body=True)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            hub.asked.append(self.path)
            if hub.broken is not None:
                return self._refuse(hub.broken, None)
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            is_api = parts[0] == "api"
            if parts[0] == "datasets":
                parts = parts[1:]
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
                    if not folder.joinpath(*rest).is_dir():
                        return self._refuse(404, "EntryNotFound")
                    about = _entries(folder, "/".join(rest), "recursive=true" in self.path.lower(), commit)
                elif after[:1] == ["paths-info"]:
                    asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
                    about = [entry for path in asked for entry in _entry(folder, folder / path, commit)]
                return self._send(json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
            if repository.gated:
                return self._refuse(403, "GatedRepo")
            path = folder.joinpath(*rest)
            if not path.is_file():
                return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            data = path.read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            if first:
                end = int(last) + 1 if last else len(data)
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                return self._send(data[int(first) : end], headers, body, status=206)
            return self._send(data, headers, body)

        def _refuse(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in ({"X-Error-Code": code} if code else {} | (headers or {})).items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    return Handler
