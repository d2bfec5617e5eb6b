"""A Hugging Face Hub on this machine: enough of its HTTP interface for the real clients.

Repositories are folders, `ROOT/models/USER/REPO/REVISION/...` and `ROOT/datasets/...`; every
revision is a commit of its own (a comma stands for a slash in its name). What was asked for is
kept in `requests`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Refused(Exception):
    """An answer other than 200, with the Hub's own error code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Hub:
    """The repositories below `root`.

    gated: ids that are there but not for everyone
    requests: every request so far, as `METHOD /path`
    """

    root: Path
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def revision(self, kind: str, repo: str, revision: str) -> Path:
        """The folder of a branch, a tag or a commit."""
        home = self.root / kind / repo
        if not home.is_dir():
            raise Refused(401, "RepoNotFound", "Repository not found")
        if repo in self.gated:
            raise Refused(403, "GatedRepo", f"Access to {kind} {repo} is restricted")
        for folder in home.iterdir():
            if revision in (folder.name.replace(",", "/"), commit_of(folder)):
                return folder
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")


def commit_of(revision: Path) -> str:
    """A commit hash for what is in the folder `revision`."""
    digest = hashlib.sha1(str(revision).encode())
    for path in sorted(p for p in revision.rglob("*") if p.is_file()):
        digest.update(path.relative_to(revision).as_posix().encode() + blob_of(path).encode())
    return digest.hexdigest()


def blob_of(path: Path) -> str:
    """git's name of a file's contents."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet; `Hub.requests` remembers."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        # Matched as it came: a revision such as `refs/convert/parquet` has its slashes quoted.
        path = url.path
        try:
            for pattern, handler in self._routes:
                match = re.fullmatch(pattern, path)
                if match:
                    parts = (part and unquote(part) for part in match.groups())
                    handler(self, *parts, query=parse_qs(url.query), body=body)
                    return
            raise Refused(404, "NotFound", f"nothing at {path}")
        except Refused as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _info(self, kind: str, repo: str, revision: str | None, **_: Any) -> None:
        folder = self.hub.revision(kind, repo, revision or "main")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        self._json({
            "id": repo, "modelId": repo, "sha": commit_of(folder), "private": False,
            "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": p.relative_to(folder).as_posix()} for p in files],
        })  # fmt: skip

    def _tree(
        self, kind: str, repo: str, revision: str, below: str | None, query: Any, **_: Any
    ) -> None:
        folder = self.hub.revision(kind, repo, revision)
        start = folder / (below or "")
        if not start.is_dir():
            raise Refused(404, "EntryNotFound", f"{below} does not exist on {revision}")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = sorted(start.rglob("*") if recursive else start.iterdir())
        self._json([self._entry(path, folder) for path in found])

    def _paths_info(self, kind: str, repo: str, revision: str, body: bytes, **_: Any) -> None:
        folder = self.hub.revision(kind, repo, revision)
        wanted = _form(body).get("paths", [])
        self._json([self._entry(folder / p, folder) for p in wanted if (folder / p).exists()])

    def _entry(self, path: Path, folder: Path) -> dict[str, Any]:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        return {"type": "file", "oid": blob_of(path), "size": path.stat().st_size, "path": name}

    def _commits(self, kind: str, repo: str, revision: str, **_: Any) -> None:
        folder = self.hub.revision(kind, repo, revision)
        date = "2026-01-01T00:00:00.000Z"
        self._json([{"id": commit_of(folder), "title": "all", "message": "", "date": date,
                     "authors": [{"user": "team"}]}])  # fmt: skip

    def _discussions(self, kind: str, repo: str, **_: Any) -> None:
        self.hub.revision(kind, repo, "main")
        self._json({"discussions": [], "count": 0, "start": 0})

    def _file(self, kind: str | None, repo: str, revision: str, name: str, **_: Any) -> None:
        folder = self.hub.revision((kind or "models/").rstrip("/"), repo, revision)
        path = folder / name
        commit = {"X-Repo-Commit": commit_of(folder)}
        if not path.is_file():
            refused = Refused(404, "EntryNotFound", "Entry not found")
            headers = {**commit, "X-Error-Code": refused.code, "X-Error-Message": str(refused)}
            self._send(404, b"Entry not found", headers)
            return
        content = path.read_bytes()
        headers = {**commit, "ETag": f'"{blob_of(path)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
        else:
            self._send(200, content, headers)

    _routes = (
        (r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", _info),
        (r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", _tree),
        (r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", _paths_info),
        (r"/api/(models|datasets)/([^/]+/[^/]+)/commits/([^/]+)", _commits),
        (r"/api/(models|datasets)/([^/]+/[^/]+)/discussions", _discussions),
        (r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _file),
    )


def _form(body: bytes) -> dict[str, list[str]]:
    """A request's body, JSON or a form."""
    if body.startswith(b"{"):
        return json.loads(body)
    return parse_qs(body.decode())


class HubServer:
    """Serves a `Hub` on a free port of this machine while the context lasts."""

    def __init__(self, root: Path) -> None:
        self.hub = Hub(root)
        handler = type("Handler", (_Handler,), {"hub": self.hub})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
