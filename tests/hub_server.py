"""A Hugging Face Hub on this machine: enough of its HTTP interface for the real clients.

Repositories are folders, `ROOT/models/USER/REPO/REVISION/...` and `ROOT/datasets/...`; every
revision is a commit of its own (a comma stands for a slash in its name). What was asked for is
kept in `requests`; `faults` are the failures it has next.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from ruamel.yaml import YAML


class Refused(Exception):
    """An answer other than 200, with the Hub's own error code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


#: The token that may write, and one that may only read.
WRITER, READER = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader"

#: A connection that is closed in the middle of an answer, or of an upload.
CUT = -1


@dataclass
class Fault:
    """A failure of the next `times` requests that match `pattern` (of `METHOD /path`).

    status: of the answer, or `CUT`
    """

    pattern: str
    status: int
    times: int = 1


@dataclass
class Hub:
    """The repositories below `root`.

    gated: ids that are there but not for everyone
    requests: every request so far, as `METHOD /path`
    blobs: large files that were uploaded, by their sha256, whether or not a commit names them
    """

    root: Path
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)

    def fault(self, request: str) -> int | None:
        """The status of the failure that is due at `request`, or None."""
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault.status
        return None

    def commit(self, repo: str, revision: str, files: dict[str, bytes]) -> Path:
        """Add `files` to a revision at once; returns its folder."""
        home = self.root / "models" / repo
        target = home / revision.replace("/", ",")
        scratch = Path(tempfile.mkdtemp(dir=self.root))
        if target.is_dir():
            shutil.copytree(target, scratch, dirs_exist_ok=True)
        for name, content in files.items():
            place = scratch / name
            if not place.resolve().is_relative_to(scratch.resolve()):
                raise Refused(400, "BadRequest", f"path {name} leaves the repository")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        shutil.rmtree(target, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        scratch.rename(target)
        return target

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


def is_large(name: str) -> bool:
    """Whether a file is kept outside git (LFS)."""
    return name.endswith(".safetensors")


def sha256_of(path: Path) -> str:
    """The name of a large file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault(request)
        if fault == CUT and length:
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if fault is not None and fault != CUT:
            headers = {"Retry-After": "0"} if fault in (429, 503) else {}
            self._send(fault, b'{"error": "as the test wants it"}', headers)
            return
        self._cut = fault == CUT
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

    _cut = False

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _require_writer(self) -> None:
        authorization = self.headers.get("Authorization") or ""
        if not authorization:
            raise Refused(401, "Unauthorized", "Invalid username or password.")
        if authorization != f"Bearer {WRITER}":
            raise Refused(403, "Forbidden", "You don't have the rights")

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            if self._cut and status < 300:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self._hang_up()
                return
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
        size = path.stat().st_size
        entry = {"type": "file", "oid": blob_of(path), "size": size, "path": name}
        if is_large(name):
            entry["lfs"] = {"oid": sha256_of(path), "size": size, "pointerSize": 130}
        return entry

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
        if is_large(name):
            headers |= {"X-Linked-Etag": f'"{sha256_of(path)}"',
                        "X-Linked-Size": str(len(content))}  # fmt: skip
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
        else:
            self._send(200, content, headers)

    def _create(self, body: bytes, **_: Any) -> None:
        self._require_writer()
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'team'}/{asked['name']}"
        if (self.hub.root / "models" / repo).is_dir():
            there = {"error": "You already created this model repo",
                     "url": f"{self._address}/{repo}"}  # fmt: skip
            self._send(409, json.dumps(there).encode(), {"Content-Type": "application/json"})
            return
        self.hub.private[repo] = asked.get("visibility") == "private"
        self.hub.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self._address}/{repo}", "name": repo})

    def _branch(self, repo: str, branch: str, body: bytes, **_: Any) -> None:
        self._require_writer()
        home = self.hub.root / "models" / repo
        target = home / branch.replace("/", ",")
        if target.is_dir():
            raise Refused(409, "Conflict", "Reference already exists")
        shutil.copytree(home / "main", target)
        self._json({})

    def _validate(self, body: bytes, **_: Any) -> None:
        """The Hub's check of a card's metadata: what it must be, as far as ptkit writes it."""
        _, head, _ = json.loads(body)["content"].split("---", 2)
        metadata = YAML(typ="safe").load(head)
        errors = [
            {"message": f'"{name}" must be a {kind.__name__}'}
            for name, kind in (("library_name", str), ("base_model", str), ("tags", list),
                               ("license", str), ("model-index", list))
            if name in metadata and not isinstance(metadata[name], kind)
        ]  # fmt: skip
        for entry in metadata.get("model-index", []):
            for result in entry["results"]:
                if not {"task", "dataset", "metrics"} <= result.keys():
                    errors.append({"message": '"model-index" has an incomplete result'})
        answer = json.dumps({"errors": errors, "warnings": []}).encode()
        self._send(400 if errors else 200, answer, {"Content-Type": "application/json"})

    def _preupload(self, repo: str, revision: str, body: bytes, **_: Any) -> None:
        self._require_writer()
        self.hub.revision("models", repo, revision)
        files = json.loads(body)["files"]
        self._json({"files": [
            {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular",
             "shouldIgnore": False} for f in files
        ]})  # fmt: skip

    def _batch(self, repo: str, body: bytes, **_: Any) -> None:
        self._require_writer()
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self._address}/lfs/{item['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _blob(self, oid: str, body: bytes, **_: Any) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "BadRequest", "the content is not what was announced")
        self.hub.blobs[oid] = body
        self._send(200, b"")

    def _commit(self, repo: str, revision: str, query: Any, body: bytes, **_: Any) -> None:
        self._require_writer()
        self.hub.revision("models", repo, revision)
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, "BadRequest", "a large file was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
        request = query.get("create_pr", ["0"])[0] == "1"
        done = self.hub.commit(repo, "refs/pr/1" if request else revision, files)
        answer = {"success": True, "commitOid": commit_of(done),
                  "commitUrl": f"{self._address}/{repo}/commit/{commit_of(done)}"}  # fmt: skip
        if request:
            answer["pullRequestUrl"] = f"{self._address}/{repo}/discussions/1"
        self._json(answer)

    def _list(self, query: Any, **_: Any) -> None:
        """Models whose card names the tags asked for, in no particular order of merit."""
        found = []
        for card in sorted((self.hub.root / "models").glob("*/*/main/README.md")):
            text = card.read_text()
            repo = card.relative_to(self.hub.root / "models").parent.parent.as_posix()
            wanted = query.get("filter", [])
            if all(f"- {tag}\n" in text for tag in wanted) and all(
                word in repo for word in query.get("search", [])
            ):
                tags = re.findall(r"^- (.+)$", text.split("---")[1], re.MULTILINE)
                found.append({"id": repo, "modelId": repo, "tags": tags, "downloads": len(text),
                              "likes": 1, "lastModified": "2026-01-02T00:00:00.000Z",
                              "private": False})  # fmt: skip
        self._json(found[: int(query.get("limit", ["1000"])[0])])

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    _routes = (
        (r"/api/repos/create", _create),
        (r"/api/models", _list),
        (r"/api/validate-yaml", _validate),
        (r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", _branch),
        (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", _preupload),
        (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", _commit),
        (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
        (r"/lfs/([0-9a-f]{64})", _blob),
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


@contextmanager
def own_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub in `folder`, and this process's client pointed at it with a token that may write."""
    root = folder / "hub"
    (root / "models").mkdir(parents=True)
    with HubServer(root) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            server.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        # The client waits longer and longer between its attempts.
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server
